"""nearkin doctor DATA"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser, whole_number
from nearkin.doctor.findings import FILE, check_target, concerned, summary, write_findings
from nearkin.errors import ConfigError, DataError, counted, listed, printable

if TYPE_CHECKING:
    from nearkin.doctor.diagnose import Report

USAGE = "nearkin doctor DATA [--run RUN] [--objective NAME] [--strict] [--json] [--write-table FILE.csv]"
ABOUT = """\
What is wrong with a data set, one finding a line: ok, warning or error, and what to do.
The files concerned are listed in doctor.csv. Exit code 3 when there is an error."""


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT, free=True)
    parser.add_argument("data", nargs="?", metavar="DATA", help="as for train")
    parser.add_argument(
        "--run", metavar="RUN", help="compare images by this run's network [a pretrained one]"
    )
    parser.flag("labels", "check labels and near copies by a network [true]")
    parser.flag("forecast", "what the objective will meet in these data [true]")
    parser.add_argument("--objective", metavar="NAME", help="to forecast [that train would use]")
    parser.add_argument("--batch-size", dest="batch_size", metavar="N", help="of the forecast")
    parser.add_argument("--sampler", metavar="NAME", help="of the forecast")
    parser.add_argument("--out", metavar="FOLDER", help=f"where to write {FILE} [.]")
    parser.add_argument(
        "--write-table",
        dest="write_table",
        metavar="FILE.csv",
        help="write path,label,split of the images that remain: without copies, unreadable and marked ones",
    )
    parser.add_argument(
        "--marks",
        metavar="FILE",
        help="CSV of path,mark[,correct]; mark is 'wrong label' or 'leave out'; marked images count no more",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.flag("strict", "exit code 3 for warnings, too")
    parser.flag("json", "one JSON object on stdout")
    parser.flag("quiet", "nothing on stderr but errors")
    return parser


def main(given: dict[str, Any]) -> int:
    if not given.get("data"):
        raise ConfigError("Examine which data? Give a folder, a table or a built-in name.")
    options = _options(given)
    target = check_target(Path(given.get("out", ".")))
    table = _table(given["write_table"], target) if "write_table" in given else None
    from nearkin.doctor.diagnose import diagnose

    quiet = given.get("quiet", False)
    report = diagnose(
        given["data"],
        forecast=options if given.get("forecast", True) else None,
        run=given.get("run"),
        labels=given.get("labels", True),
        marks=given.get("marks"),
        device=given.get("device", "auto"),
        quiet=quiet,
    )
    if (unknown := report.marks.unknown) and not quiet:
        sys.stderr.write(
            f"warning: {counted(len(unknown), 'marked path')} not among the images: {listed(unknown)}\n"
        )
    rows = concerned(report.findings)
    record = {
        "run": given.get("run"),
        "data": report.data,
        "errors": report.errors,
        "warnings": report.warnings,
        "findings": [finding.to_dict() for finding in report.findings],
        "files": str(target) if rows else None,
        "table": None if table is None else str(table),
    }
    text = "".join(f"{finding.line()}\n" for finding in report.findings)
    try:
        write_findings(target, report.findings)
    finally:  # they are shown though the disk is full
        show(record, text, as_json=given.get("json", False))
        sys.stdout.flush()
    if rows:
        _say(f"{counted(rows, 'file')} concerned, listed in {target}", quiet)
    _say(summary(report.findings), quiet)
    if table is not None:  # after the findings are shown, since it may fail
        _say(_write(table, report), quiet)
    bad = report.errors + (report.warnings if given.get("strict", False) else 0)
    return 3 if bad else 0


def _say(note: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(f"note: {printable(note)}\n")


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of the training to forecast."""
    from nearkin.evaluation.options import Device, check_choice, check_run

    check_choice("device", given.get("device", "auto"), Device)
    if "run" in given:
        check_run(Path(given["run"]))
    own: dict[str, Any] = {n: given[n] for n in ("objective", "sampler") if n in given}
    own |= {
        name: value for name, value in given.items() if name.startswith(("objective.", "model."))
    }
    if "batch_size" in given:
        own["batch_size"] = whole_number("batch-size", given["batch_size"])
    return own


def _table(name: str, findings: Path) -> Path:
    """Where to write the table. Raises ConfigError."""
    from nearkin.doctor.table import check_table

    table = Path(name)
    check_table(table)
    if table.absolute() == findings.absolute():
        raise ConfigError(f"--write-table {table} is the list of findings; give another name.")
    return table


def _refused(table: Path) -> list[str]:
    """Why a training with this table would not start: a validation split may need more images."""
    from nearkin.data.dataset import load_dataset

    try:
        load_dataset(str(table), check=None)
    except DataError as error:
        return [str(error).rstrip(".")]
    return []


def _write(table: Path, report: Report) -> str:
    """Write the table, and say what it leaves out."""
    from nearkin.doctor.classes import class_findings
    from nearkin.doctor.table import write_table

    inventory = report.inventory
    if not inventory.from_files:
        raise ConfigError(f"{printable(report.data)} are no files, so there is no table of them.")
    marked = report.marks.out
    kept = write_table(table, inventory, report.superfluous | marked)
    errors = [
        finding.text
        for finding in class_findings(inventory.without(report.superfluous | marked))
        if finding.level == "error"
    ] or _refused(table)
    then = (
        f"; it cannot be trained on: {'; '.join(errors)}"
        if errors
        else f"; next: nearkin train {table}"
    )
    out = len(inventory.labels) - kept
    why = f" ({len(marked)} marked, {out - len(marked)} copied or unreadable)" if out else ""
    return f"{kept} images in {table}, {out} left out{why}{then}"
