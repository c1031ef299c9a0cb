"""nearkin list models|objectives|recipes"""

from __future__ import annotations

import sys
from typing import Any

from nearkin.catalogue import objectives, recipes
from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, nearest
from nearkin.imports import import_eager

USAGE = "nearkin list models|objectives|recipes [PATTERN]"
KINDS = ("models", "objectives", "recipes")


def parser() -> Parser:
    parser = Parser(USAGE, "The names to choose from, one a line.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="models only, e.g. '*resnet*'"
    )
    return parser


def main(given: dict[str, Any]) -> int:
    kind, pattern = given.get("kind", ""), given.get("pattern", "")
    if kind not in KINDS:
        raise ConfigError(f"List what? One of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if pattern and kind != "models":
        raise ConfigError(f"nearkin list {kind} takes no pattern; leave it out.")
    if kind == "models":
        lines = import_eager("timm").list_models(pattern)
    elif kind == "recipes":
        lines = recipes()
    else:
        known = objectives()
        width = max(map(len, known))
        lines = [f"{name:<{width}}  {entry.summary}" for name, entry in known.items()]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
