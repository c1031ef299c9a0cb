"""A comparison as text: on the terminal, as Markdown, as CSV with one row a run, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nearkin.comparison.page import comparison_page
from nearkin.comparison.results import Comparison
from nearkin.errors import counted, printable
from nearkin.files import write_atomic, write_csv
from nearkin.training.run_folder import write_json

NAME = "compare"
HEADER = (
    *("objective", "top-1 %", "against ce (95 %)", "verdict", "wins"),
    *("balanced", "log loss", "crops/s", "s", "MiB", "M weights"),
)
COLUMNS = (
    *("entry", "seed", "state", "top1", "balanced", "log_loss", "seconds"),
    *("crops_per_second", "memory", "epochs", "folder", "error"),
)


def write(comparison: Comparison) -> None:
    """Write compare.json, compare.csv, compare.md and compare.html into the folder. Raises SaveFailed."""
    folder = comparison.folder
    write_json(folder / f"{NAME}.json", comparison.to_dict())
    rows = [[getattr(run, name) for name in COLUMNS] for run in comparison.runs]
    write_csv(folder / f"{NAME}.csv", COLUMNS, [["" if v is None else v for v in r] for r in rows])
    page = comparison_page(comparison)
    write_atomic(folder / f"{NAME}.html", page.encode("utf-8", "backslashreplace"))
    write_atomic(folder / f"{NAME}.md", markdown(comparison).encode("utf-8", "surrogateescape"))


def text(comparison: Comparison) -> str:
    """The table in columns, the failed runs, and where the files are."""
    rows = [HEADER, *cells(comparison)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_remarks(comparison)]) + "\n"


def markdown(comparison: Comparison) -> str:
    """The table, what was held equal, and every failed run."""

    def row(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    table = [row(HEADER), row(["---"] * len(HEADER)), *map(row, cells(comparison))]
    equal = [row(("equal for all", "")), row(("---", "---")), *map(row, comparison.equal.items())]
    title = f"# {printable(comparison.data)}: {', '.join(map(printable, comparison.entries))}"
    size = f"{counted(comparison.seeds, 'seed')}, {counted(comparison.images, 'test image')}."
    parts = [title, size, "\n".join(table), *_remarks(comparison), "\n".join(equal)]
    return "\n\n".join(parts) + "\n"


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """The rows below HEADER."""
    return [_cells(row) for row in comparison.table()]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = "" if row["top1_std"] is None else f" ± {100 * row['top1_std']:.2f}"
    difference = ""
    if row["difference"] is not None:
        values = (100 * row[name] for name in ("difference", "low", "high"))
        difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*values)
    return (
        printable(row["entry"]),
        "-" if row["top1"] is None else f"{100 * row['top1']:.2f}{spread}",
        difference,
        row["verdict"],
        "" if row["wins"] is None else f"{row['wins']} of {row['compared']}",
        _number(row["balanced"], 100, 2),
        _number(row["log_loss"], 1, 3),
        _number(row["crops_per_second"], 1, 0),
        _number(row["seconds"], 1, 0),
        _number(row["memory"], 2**-20, 0),
        _number(row["weights"], 1e-6, 2),
    )


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def _remarks(comparison: Comparison) -> list[str]:
    """Failed and missing runs, the winner and the notes, a line each."""
    failed = [run for run in comparison.runs if run.state == "failed"]
    waiting = sum(run.state == "waiting" for run in comparison.runs)
    lines = [
        f"failed: {printable(run.entry)}, seed {run.seed}: {printable(run.error or '')}"
        for run in failed
    ]
    lines += [f"{counted(waiting, 'run')} not finished yet"] if waiting else []
    if comparison.picked is not None:
        entry, run = comparison.picked
        lines.append(
            f"picked on validation: {printable(entry)}; trained on train and validation: {printable(run)}"
        )
    return lines + [f"note: {printable(note)}" for note in comparison.notes]
