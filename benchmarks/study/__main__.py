"""Run pieces of the study, or draw what is there.

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study [PIECE ...]     run them (all without a name)
    python -m benchmarks.study --figures                                  docs/data/study-*.csv -> tables and figures

FOLDER/NAME/{train,val,test} are folders of class folders; the runs are kept in FOLDER/runs, so that a piece that was
stopped goes on. Each finished piece replaces its rows in docs/data/study-runs.csv and study-contrasts.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import figures
from benchmarks.study.pieces import PIECES
from nearkin.comparison.api import compare_options
from nearkin.comparison.results import Comparison
from nearkin.files import write_atomic

RUNS = Path("docs/data/study-runs.csv")
CONTRASTS = Path("docs/data/study-contrasts.csv")
RUN_FIELDS = (
    *("piece", "entry", "seed", "state", "top1", "balanced", "log_loss"),
    *("seconds", "crops_per_second", "error"),
)
CONTRAST_FIELDS = (
    *("piece", "entry", "measure", "seeds", "difference", "low", "high", "p_value", "wins"),
    "verdict",
)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--seeds", type=int, default=3, help="more go on where fewer ended [3]")
    parser.add_argument("--jobs", default="auto", help="as of nearkin compare [auto]")
    parser.add_argument("--figures", action="store_true", help="draw what is there")
    given = parser.parse_args()
    if not given.figures:
        root = Path(os.environ["NEARKIN_BENCH_STUDY"])
        for name in given.pieces or PIECES:
            found = _run(root, name, given.seeds, given.jobs)
            _replace(RUNS, RUN_FIELDS, name, _run_rows(name, found))
            _replace(CONTRASTS, CONTRAST_FIELDS, name, _contrast_rows(name, found))
    figures.draw(RUNS, CONTRASTS)


def _run(root: Path, name: str, seeds: int, jobs: str) -> Comparison:
    piece = PIECES[name]
    asked = {"objectives": piece.objectives, "seeds": seeds, "jobs": jobs}
    values = piece.options | {"data": str(root / piece.data), "out": root / "runs" / name}
    (root / "runs").mkdir(exist_ok=True)
    return compare_options(asked, values, quiet=False)


def _run_rows(name: str, found: Comparison) -> list[dict[str, Any]]:
    return [
        {"piece": name} | {field: getattr(run, field) for field in RUN_FIELDS[1:]}
        for run in found.runs
    ]


def _contrast_rows(name: str, found: Comparison) -> list[dict[str, Any]]:
    return [
        {"piece": name, "low": each.interval[0], "high": each.interval[1]}
        | {field: getattr(each, field) for field in CONTRAST_FIELDS if field in vars(each)}
        for each in found.contrasts
    ]


def _replace(path: Path, fields: Sequence[str], name: str, rows: list[dict[str, Any]]) -> None:
    """The rows of other pieces, then these."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["piece"] != name]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept + rows)
    write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    main()
