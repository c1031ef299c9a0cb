"""nearkin report RUN..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, printable
from nearkin.evaluation.options import BadPolicy, Device, check_choice, check_run

USAGE = "nearkin report RUN... [--out FILE] [--data PATH] [--json]"
ABOUT = """\
One page about a finished run, to look at: errors, confused classes, a map, and the nearest training images of each
image. Several runs are compared."""


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders that train printed")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page [report.html in RUN; runs.html in the first of several]",
    )
    parser.add_argument("--data", metavar="PATH", help="where the images of RUN are now")
    parser.add_argument(
        "--bad-images",
        dest="bad_images",
        metavar="NAME",
        help="unreadable images: error stops, skip leaves them out [as in the training]",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.flag("json", "one JSON object on stdout")
    return parser


def main(given: dict[str, Any]) -> int:
    runs = [Path(run) for run in given.get("runs") or []]
    if not runs:
        raise ConfigError("Report on which run? Give the folder that train printed.")
    check_choice("device", given.get("device", "auto"), Device)
    if "bad_images" in given:
        check_choice("bad-images", given["bad_images"], BadPolicy)
    from nearkin.cli.rows import check_out

    out = Path(given["out"]) if "out" in given else None
    check_out(out)
    for name in ("data", "device", "bad_images"):
        if len(runs) > 1 and name in given:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for one RUN; several are compared by what they kept."
            )
    for run in runs:
        check_run(run)  # before torch is imported
    from nearkin.training.report import report, report_several

    if len(runs) > 1:
        page = report_several(runs, out)
    else:
        device, bad = given.get("device", "auto"), given.get("bad_images")
        page = report(runs[0], given.get("data"), out, device, bad)
    shown = printable(str(page))
    show(
        {"run": str(runs[0]), "page": str(page)},
        f"page {shown}\n",
        as_json=given.get("json", False),
    )
    return 0
