"""nearkin list models|objectives|recipes"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from nearkin.cli.arguments import Parser, show_help
from nearkin.errors import ConfigError, nearest

USAGE = "nearkin list models|objectives|recipes [PATTERN]"
KINDS = ("models", "objectives", "recipes")


def main(argv: list[str]) -> int:
    parser = Parser(USAGE, "What there is to choose from, a line each.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="models only, e.g. '*resnet*'"
    )
    parser.flag("help", "this help")
    given = parser.read(argv)
    if given.get("help"):
        show_help(parser)
        return 0
    kind = given.get("kind") or ""
    if kind not in KINDS:
        raise ConfigError(f"List what? One of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    lines = {"models": _models, "objectives": _objectives, "recipes": _recipes}[kind](
        given.get("pattern") or ""
    )
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _models(pattern: str) -> list[str]:
    import timm

    return list(timm.list_models(pattern))


def _objectives(_: str) -> list[str]:
    from nearkin.objectives import Objective

    width = max(len(name) for name in Objective.registry)
    return [
        f"{name:<{width}}  {(kind.__doc__ or '').strip().splitlines()[0]}"
        for name, kind in sorted(Objective.registry.items())
    ]


def recipe_or_file(name: str) -> Path:
    """The file of that name, or the recipe that comes with nearkin where there is no such file."""
    packed = Path(str(files("nearkin") / "recipes")) / f"{name.removesuffix('.yaml')}.yaml"
    given = Path(name)
    return packed if not given.exists() and "/" not in name and packed.is_file() else given


def _recipes(_: str) -> list[str]:
    folder = files("nearkin") / "recipes"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
