"""nearkin list models|objectives|recipes"""

from __future__ import annotations

import sys

from nearkin.catalogue import objectives, recipes
from nearkin.cli.arguments import Parser, show_help
from nearkin.errors import ConfigError, nearest
from nearkin.imports import import_eager

USAGE = "nearkin list models|objectives|recipes [PATTERN]"
KINDS = ("models", "objectives", "recipes")


def main(argv: list[str]) -> int:
    parser = Parser(USAGE, "The names to choose from, one a line.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="models only, e.g. '*resnet*'"
    )
    parser.flag("help", "this help")
    given = parser.read(argv)
    if given.get("help"):
        show_help(parser)
        return 0
    kind, pattern = given.get("kind", ""), given.get("pattern", "")
    if kind not in KINDS:
        raise ConfigError(f"List what? One of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if pattern and kind != "models":
        raise ConfigError(f"nearkin list {kind} takes no pattern; leave it out.")
    lines = _models(pattern) if kind == "models" else _described()[kind]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def _models(pattern: str) -> list[str]:
    return list(import_eager("timm").list_models(pattern))


def _described() -> dict[str, list[str]]:
    known = objectives()
    width = max(map(len, known))
    rows = [f"{name:<{width}}  {entry.summary}" for name, entry in known.items()]
    return {"objectives": rows, "recipes": recipes()}
