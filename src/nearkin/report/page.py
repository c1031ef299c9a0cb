"""HTML from the templates of this folder. Every value is escaped, and control characters are made visible."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nearkin.errors import printable

if TYPE_CHECKING:
    from jinja2 import Environment

    from nearkin.report.axes import Svg

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "–"  # noqa: RUF001


class Picture(NamedTuple):
    """A figure of a page."""

    title: str
    svg: Svg
    caption: str


def render(template: str, **values: Any) -> str:
    """The page of a template. A value that the template names and that is not given raises `jinja2.UndefinedError`."""
    return _environment().get_template(template).render(**values)


def standalone(picture: Svg) -> str:
    """A picture with the style of the pages, as a file of its own."""
    opening, rest = picture.split(">", 1)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return f"{opening}><style>{style}</style>{rest}\n"


@cache
def _environment() -> Environment:
    import jinja2  # takes 0.15 s, which only pages need

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    """Names and messages are other people's text: bidirectional marks in them could turn a line around."""
    return value if hasattr(value, "__html__") else printable(str(value))
