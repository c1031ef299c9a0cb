"""nearkin compare [DATA]"""

from __future__ import annotations

from typing import Any

from nearkin.catalogue import recipe_or_file
from nearkin.cli import show
from nearkin.cli.arguments import Parser
from nearkin.cli.train import with_data
from nearkin.comparison.entries import REFUSED
from nearkin.config import FREE, CompareOptions, RunConfig, merge, read_yaml
from nearkin.errors import printable

USAGE = "nearkin compare [DATA] [--objectives ce,supcon,cone] [--seeds 5] [--OPTION VALUE]"
ABOUT = """\
Train several objectives on equal terms, and say whether their differences are more than chance.
Options of train are given to every run; those of one objective stand behind its name: supcon:weight=1."""


def main(given: dict[str, Any]) -> int:
    given = with_data(given)
    as_json, quiet = given.pop("json", False), given.pop("quiet", False)
    asked = {name: given.pop(name) for name in CompareOptions.model_fields if name in given}
    values = merge(*(read_yaml(recipe_or_file(name)) for name in given.pop("config", [])), given)
    from nearkin.comparison.api import compare_options

    found = compare_options(asked, values, quiet=quiet)
    from nearkin.comparison.tables import text

    page = f"page {printable(str(found.folder / 'compare.html'))}\n"
    show(found.to_dict(), text(found) + page, as_json=as_json)
    states = {run.state for run in found.runs}
    return 1 if states == {"failed"} else 0


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT, free=True)
    parser.add_argument("word", nargs="?", metavar="DATA", help="what to learn from [digits]")
    parser.add_argument("-c", "--config", action="append", metavar="FILE", help="options in YAML")
    parser.add_argument(
        "--out", metavar="PATH", help="folder of the comparison; one of an earlier call goes on"
    )
    parser.flag("json", "the result as one JSON object on stdout")
    parser.flag("quiet", "nothing on stderr but errors")
    parser.options(CompareOptions)
    parser.options(RunConfig, without=REFUSED | {"out", *FREE.values()})
    return parser
