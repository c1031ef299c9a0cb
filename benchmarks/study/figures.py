"""Tables and figures of the study, from its CSV files alone: docs/study.md and docs/study-PIECE.svg."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.study.pieces import PIECES
from nearkin.report.axes import Svg
from nearkin.report.page import standalone
from nearkin.report.svg import Interval, forest

PAGE = Path("docs/study.md")
HEAD = """\
# The study: every number

Made by `python -m benchmarks.study --figures` from [data/study-runs.csv](data/study-runs.csv) and
[data/study-contrasts.csv](data/study-contrasts.csv); [which-objective.md](which-objective.md) says what follows.
Test top-1 in %, mean ± standard deviation over seeds; differences from `ce` in points with 95 % intervals that count
seeds and test images ([compare.md](compare.md)). Equal crops through the network in each table, as far as whole
epochs allow. 2 shared CPU cores, two runs at a time; crops/s is a mean over runs beside which other work ran, so it
tells no costs.
"""


def draw(runs: Path, contrasts: Path) -> None:
    """Write the page, and one figure for each piece."""
    every, against = _read(runs), _read(contrasts)
    parts = [HEAD]
    for name, piece in PIECES.items():
        mine = [row for row in every if row["piece"] == name and row["state"] == "finished"]
        if not mine:
            continue
        differences = _against(against, name, "top1")
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in piece.options.items())
        parts.append(f"## {name}\n\n{piece.question} `{piece.data} {options}`\n")
        parts.append("\n".join(_table(mine, differences)) + "\n")
        if differences:
            parts.append("\n".join(_others(against, name, differences)) + "\n")
            picture = PAGE.with_name(f"study-{name}.svg")
            picture.write_text(standalone(_figure(differences)))
            parts.append(f"![differences from ce]({picture.name})\n")
    PAGE.write_text("\n".join(parts))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: list[dict[str, str]], differences: dict[str, dict[str, str]]) -> Iterator[str]:
    yield "| entry | seeds | top-1 | against ce | verdict | log loss | crops/s |"
    yield "|---|---|---|---|---|---|---|"
    for entry in dict.fromkeys(row["entry"] for row in rows):
        mine = [row for row in rows if row["entry"] == entry]
        top1 = [100 * float(row["top1"]) for row in mine]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        loss = statistics.mean(float(row["log_loss"]) for row in mine)
        rate = statistics.mean(float(row["crops_per_second"]) for row in mine)
        found = differences.get(entry)
        shown = "" if found is None else _interval(found, 100, 2)
        yield (
            f"| `{entry}` | {len(mine)} | {statistics.mean(top1):.2f}{spread} | {shown} | "
            f"{found['verdict'] if found else ''} | {loss:.3f} | {rate:.0f} |"
        )


def _against(rows: list[dict[str, str]], piece: str, measure: str) -> dict[str, dict[str, str]]:
    """The differences of a piece in one measure, by entry."""
    return {row["entry"]: row for row in rows if (row["piece"], row["measure"]) == (piece, measure)}


def _others(rows: list[dict[str, str]], piece: str, entries: Iterable[str]) -> Iterator[str]:
    """The other two measures; more is better for both, so a lower log loss is above 0."""
    yield "| entry | balanced accuracy against ce | verdict | log loss against ce, lower is + | verdict |"
    yield "|---|---|---|---|---|"
    balanced, loss = (_against(rows, piece, name) for name in ("balanced", "log_loss"))
    for entry in entries:
        shares, nats = _interval(balanced[entry], 100, 2), _interval(loss[entry], 1, 3)
        words = balanced[entry]["verdict"], loss[entry]["verdict"]
        yield f"| `{entry}` | {shares} | {words[0]} | {nats} | {words[1]} |"


def _interval(row: dict[str, str], scale: float, digits: int) -> str:
    value, low, high = (scale * float(row[name]) for name in ("difference", "low", "high"))
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _figure(differences: dict[str, dict[str, str]]) -> Svg:
    rows = []
    for style, (entry, row) in enumerate(differences.items(), start=1):
        value, low, high = (100 * float(row[name]) for name in ("difference", "low", "high"))
        rows.append(Interval(entry, value, low, high, _interval(row, 100, 2), style))
    return forest(
        rows,
        title="Differences from ce in points",
        description="Test top-1 less that of ce, with 95 % intervals.",
        label="points above ce",
        band=0.5,
    )
