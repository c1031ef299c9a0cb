"""Episodes on classes that no run has seen, with the networks of a piece of the study.

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study.episodes [PIECE] [DATA]

PIECE is one that begins from packaged weights; by default the networks that `tune-grocery-5` fine-tuned on groceries,
on the training images of clothing10. The frozen network, which all of them began from, is one more row. 5 ways, 1 and 5
shots, the images themselves without augmented copies. Each result is a row of docs/data/study-episodes.csv; what is
there is not computed again.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nearkin
from benchmarks.bench import append_row, read_rows
from benchmarks.study.pieces import PIECES, finished_runs

RESULTS = Path("docs/data/study-episodes.csv")
FROZEN = "frozen"
SHOTS, EPISODES = (1, 5), 2000


def main() -> None:
    """See above."""
    usual = "tune-grocery-5", "clothing10"
    piece, data = (*sys.argv[1:3], *usual[len(sys.argv[1:3]) :])
    root = Path(os.environ["NEARKIN_BENCH_STUDY"])
    for entry, seed, run in _networks(root, piece):
        for shots in SHOTS:
            key = {"piece": piece, "entry": entry, "seed": str(seed), "shots": str(shots)}
            if any(key.items() <= row.items() for row in read_rows(RESULTS)):
                continue
            found = nearkin.fewshot(
                run, root / data, split="train", ways=5, shots=shots, copies=0, episodes=EPISODES
            )
            values = {"mean": round(found.mean, 5), "interval": round(found.interval, 5)}
            append_row(RESULTS, key | {"data": data} | values)


def _networks(root: Path, name: str) -> list[tuple[str, int, Path]]:
    """Entry, seed and run folder of the finished runs of a piece, after the frozen network."""
    piece, place = PIECES[name], root / "runs" / name
    frozen = place / FROZEN
    if not (frozen / "model.safetensors").exists():  # ends with the probe: the packaged backbone
        shutil.rmtree(frozen, ignore_errors=True)  # of a call that was killed
        options = piece.options | {"images_per_class": 5, "epochs": 0}
        nearkin.train(root / piece.data, out=frozen, report=False, **options)
    return [(FROZEN, 0, frozen), *finished_runs(root, name)]


if __name__ == "__main__":
    main()
