"""Settings of the site: `uv run --group docs python -m sphinx -W docs site`.

The pages are Markdown as GitHub shows it. What only the site needs is added here: the navigation from the tables of
links, MathML for the equations, so that no page loads anything from elsewhere, and reStructuredText for the docstrings.
"""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx

project = "nearkin"
version = release = metadata.version("nearkin")
html_title = f"nearkin {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = html_show_sphinx = False
html_show_search_summary = (
    False  # it reads pages by fetch, which browsers refuse to a page opened from a file
)
smartquotes = False  # it makes one dash of the two of --lr
highlight_language = "none"  # of blocks that name no language: commands and their output
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

# The name of a function and what follows it without brackets: TeX puts a thin space between them.
FUNCTION = re.compile(r"<mo>(?=&ApplyFunction;</mo>\s*<m[^o])")
# First link of a row of a table, or of an item of a list.
ENTRY = re.compile(r"^(?:\||\d+\.|-) *\[[^\]]*\]\(([^):#]+)\.md\)", re.MULTILINE)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", rewrite_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))


def add_navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    """Append the toctrees of a page that lists others; in the file, GitHub would show them as code blocks."""
    if page == "index" or page.endswith("/README"):
        source[0] += navigation(source[0], captions=page == "index")


def navigation(text: str, *, captions: bool) -> str:
    """One hidden toctree for each section of a page that lists pages beside or below itself."""
    toctrees = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        pages = [page for page in ENTRY.findall(section) if not page.startswith("..")]
        caption = f":caption: {section.splitlines()[0]}\n" if captions else ""
        if pages:
            toctrees.append(
                "\n```{toctree}\n:hidden:\n" + caption + "\n" + "\n".join(pages) + "\n```\n"
            )
    return "".join(toctrees)


def visit_math(translator: Any, node: Element) -> None:
    translator.body.append(mathml(node, block=False))
    _skip()


def visit_math_block(translator: Any, node: Element) -> None:
    # The block scrolls where it is wider than the page, so the keyboard must reach it.
    translator.body.append(f'<div class="math" tabindex="0">{mathml(node, block=True)}</div>\n')
    _skip()


def mathml(node: Element, *, block: bool) -> str:
    """An equation as MathML; one that docutils cannot convert is a warning, hence an error of the build."""
    from docutils.utils.math import MathError
    from docutils.utils.math.latex2mathml import tex2mathml
    from sphinx.util import logging

    try:
        equation = str(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
        return ""
    equation = FUNCTION.sub('<mo rspace="0.1667em">', equation)
    # `aligned` stands for a table of displayed equations, with limits above and below their sums.
    return equation.replace('class="ams-align"', 'class="ams-align" displaystyle="true"')


def _skip() -> None:
    from docutils.nodes import SkipNode

    raise SkipNode


def skip_member(
    _app: Sphinx, _what: str, _name: str, member: object, _skip: bool, _options: Any
) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(member).__name__ == "_tuplegetter" else None


def rewrite_docstring(
    _app: Sphinx, _what: str, _name: str, owner: object, _options: Any, lines: list[str]
) -> None:
    lines[:] = restructured("\n".join(lines), argument_names(owner)).splitlines()


def argument_names(owner: object) -> list[str]:
    """The arguments of a function or the fields of a class."""
    try:
        return list(inspect.signature(owner).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []


def restructured(docstring: str, names: list[str]) -> str:
    """A docstring of nearkin as reStructuredText.

    Indented paragraphs, the equations, become literal blocks; `code` becomes literal; what is said of an argument in
    `names` becomes an item of a list.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        if block.startswith("    "):
            blocks.append("::\n\n" + block)
        else:
            text = " ".join(line.strip() for line in block.splitlines())
            blocks += [_part(part, names) for part in _parts(text, names)]
    return "\n\n".join(blocks) + "\n"


def _parts(text: str, names: list[str]) -> list[str]:
    """A paragraph cut before what is said of each argument, and before validity, errors and source."""
    name = "|".join(map(re.escape, names)) or "(?!)"
    argument = rf"(?:{name})(?:, (?:{name}))*(?::| [<>]=?) "
    start = rf"(?:^|(?<=[.;] ))(?={argument}|All anchors |Invalid: |Returns |Raises |Source: )"
    return [part.strip() for part in re.split(start, text) if part.strip()]


def _part(text: str, names: list[str]) -> str:
    head, colon, rest = text.partition(": ")
    if colon and set(head.split(", ")) <= set(names):
        return f"- **{head}**: {_inline(rest)}"
    if text.split(" ")[0] in names and re.match(r"\w+ [<>]", text):
        return f"- **{text.split(' ')[0]}** {_inline(text.partition(' ')[2])}"
    return _inline(text)


def _inline(text: str) -> str:
    """Running text with its `code` as literals and all other markup escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # not in pairs
        return re.sub(r"([\\*|_`])", r"\\\1", text)
    for number, part in enumerate(parts):
        parts[number] = rf"\ ``{part}``\ " if number % 2 else re.sub(r"([\\*|_])", r"\\\1", part)
    return "".join(parts)
