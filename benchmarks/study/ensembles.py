"""One model, and an ensemble of all seeds, with one view and with ten, from the runs of a piece of the study.

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study.ensembles [PIECE]     few-cifar by default

Each result is a row of docs/data/study-ensembles.csv; what is there is not computed again. `seeds` is one seed, or all
of an ensemble joined by +.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nearkin
from benchmarks.bench import append_row, read_rows
from benchmarks.study.pieces import finished_runs
from nearkin.evaluation.options import Tta

RESULTS = Path("docs/data/study-ensembles.csv")
VIEWS: tuple[Tta, ...] = ("none", "tencrop")


def main() -> None:
    """See above."""
    piece = sys.argv[1] if len(sys.argv) > 1 else "few-cifar"
    runs: dict[str, dict[int, Path]] = {}
    for entry, seed, run in finished_runs(Path(os.environ["NEARKIN_BENCH_STUDY"]), piece):
        runs.setdefault(entry, {})[seed] = run
    for entry, by_seed in runs.items():
        for seeds in (*((seed,) for seed in by_seed), tuple(by_seed)):
            for tta in VIEWS:
                joined = "+".join(map(str, seeds))
                key = {"piece": piece, "entry": entry, "seeds": joined, "tta": tta}
                if any(key.items() <= row.items() for row in read_rows(RESULTS)):
                    continue
                found = nearkin.evaluate([by_seed[seed] for seed in seeds], tta=tta)
                scores = {"top1": round(found.top1, 5), "log_loss": round(found.log_loss, 5)}
                append_row(RESULTS, key | scores | {"images": found.n})


if __name__ == "__main__":
    main()
