"""What a classifier that is fitted to the final features gains, for the networks of a piece of the study.

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study.refits PIECE [ENTRY ...]

PIECE is one that begins from packaged weights; without ENTRY all of its runs are taken. The features of each finished
run get a logistic regression, as by `--refit`, on the same training images; unlike there it is never left out. Each
result is a row of docs/data/study-refits.csv, beside which docs/data/study-runs.csv has the classifier of the training;
what is there is not computed again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nearkin
from benchmarks.bench import append_row, read_rows
from benchmarks.study.pieces import PIECES, finished_runs

RESULTS = Path("docs/data/study-refits.csv")


def main() -> None:
    """See above."""
    root = Path(os.environ["NEARKIN_BENCH_STUDY"])
    name, entries = sys.argv[1], sys.argv[2:]
    piece = PIECES[name]
    for entry, seed, run in finished_runs(root, name):
        key = {"piece": name, "entry": entry, "seed": str(seed)}
        if (entries and entry not in entries) or any(
            key.items() <= row.items() for row in read_rows(RESULTS)
        ):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = piece.options | {"epochs": 0, "seed": seed, "weights": str(run)}
            fitted = nearkin.train(
                root / piece.data, "ce", out=Path(folder) / "run", report=False, **options
            ).metrics
        scores = {measure: round(fitted[measure], 5) for measure in ("top1", "log_loss")}
        append_row(RESULTS, key | scores | {"images": fitted["n"]})


if __name__ == "__main__":
    main()
