"""Which settings fine-tune best: runs of `nearkin train` that differ from the default in one option.

    NEARKIN_BENCH_PHOTOS=FOLDER python -m benchmarks.photo_search [NAME ...]

The test splits are not looked at. A setting is judged by images that were held out from training: the official
validation images, and the training images beyond so many per class, or a fifth of them where all are used. Every run
keeps its last weights, so nothing is chosen on these images but the setting. Two runs at a time, each on one core; each
is one row of benchmarks/photo_search.csv, and what is there is not run again. All settings run on the first cell, those
of ELSEWHERE on every cell. Rows with the source `prototype` come from a loop that was written before `--blocks` and
`--objective.attach` existed, with the official validation images and the best epoch.
"""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.bench import append_row, read_rows

RESULTS = Path("benchmarks/photo_search.csv")
FIELDS = (
    "source",
    "cell",
    "seed",
    "name",
    "options",
    "top1",
    "log_loss",
    "images",
    "seconds",
)
# Data set, images per class, epochs.
CELLS: dict[str, tuple[str, int | None, int]] = {
    "grocery81, 5 per class": ("grocery81", 5, 20),
    "grocery81, 20 per class": ("grocery81", 20, 9),
    "grocery81, all": ("grocery81", None, 7),
    "clothing10, all": ("clothing10", None, 6),
}
# Beside the default of a run from pretrained weights: SupCon with weight 0.5 on the features.
SETTINGS: dict[str, str] = {
    "default": "",
    "ce": "--objective ce",
    "ce, shuffled": "--objective ce --sampler shuffle",
    "ce, shuffled, smoothing 0": "--objective ce --sampler shuffle --objective.smoothing 0",
    "ce, averaged weights": "--objective ce --ema 0.98",
    "ce, averaged weights, lr 1e-3": "--objective ce --ema 0.98 --lr 1e-3",
    "ce, lr 1e-4": "--objective ce --lr 1e-4",
    "ce, lr 1e-3": "--objective ce --lr 1e-3",
    "projection": "--objective supcon --objective.attach projection",
    "weight 0.2": "--objective supcon --objective.weight 0.2",
    "weight 1": "--objective supcon --objective.weight 1",
    "weight 2": "--objective supcon --objective.weight 2",
    "temperature 0.05": "--objective supcon --objective.temperature 0.05",
    "temperature 0.2": "--objective supcon --objective.temperature 0.2",
    "two views": "--objective supcon --objective.views 2",
    "sincere": "--objective sincere",
    "sincere, weight 1": "--objective sincere --objective.weight 1",
    "schane, published": "--objective schane",
    "schane, mix 0.5": "--objective schane --objective.mix 0.5 --objective.views 1",
    "schane, mix 0.5, temperature 0.1": "--objective schane --objective.mix 0.5 --objective.views 1 "
    "--objective.temperature 0.1",
    "schane, mix 0.5, temperature 0.1, hardness 0": "--objective schane --objective.mix 0.5 --objective.views 1 "
    "--objective.temperature 0.1 --objective.hardness 0",
    "opl": "--objective opl",
    "cone": "--objective cone",
    "shuffled": "--sampler shuffle",
    "2 blocks": "--blocks 2",
    "all blocks": "--blocks all",
    "all blocks, layer decay 0.75": "--blocks all --layer-decay 0.75",
    "BatchNorm learns its statistics": "--no-freeze-batchnorm",
    "lr 1e-4": "--lr 1e-4",
    "lr 1e-3": "--lr 1e-3",
    "head lr 1": "--head-lr 1",
    "head lr 10": "--head-lr 10",
    "weight decay 0.005": "--weight-decay 0.005",
    "weight decay 0.2": "--weight-decay 0.2",
    "batch 16": "--batch-size 16",
    "batch 64": "--batch-size 64",
    "batch 128": "--batch-size 128",
    "medium": "--augment medium",
    "crops from 0.2": "--crop-scale 0.2",
    "smoothing 0": "--objective supcon --objective.smoothing 0",
    "averaged weights": "--ema 0.98",
    "evaluation at 160 px": "--eval-size 160",
    "evaluation at 224 px": "--eval-size 224",
    "40 epochs": "--epochs 40",
}
ELSEWHERE = ("default", "ce", "ce, averaged weights")


def main() -> None:
    names = sys.argv[1:]
    first = next(iter(CELLS))
    wanted = [
        (cell, name)
        for cell in CELLS
        for name in SETTINGS
        if (name in names if names else cell == first or name in ELSEWHERE)
    ]
    cores: SimpleQueue[int] = SimpleQueue()
    for core in range(os.cpu_count() or 1):
        cores.put(core)

    def run(job: tuple[str, str]) -> None:
        done = {(row["source"], row["cell"], row["name"]) for row in read_rows(RESULTS)}
        if ("nearkin", *job) not in done:
            core = cores.get()
            try:
                append_row(RESULTS, _run(*job, core))
            finally:
                cores.put(core)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, wanted))


def _run(cell: str, name: str, core: int, seed: int = 0) -> dict[str, Any]:
    data, images, epochs = CELLS[cell]
    with tempfile.TemporaryDirectory() as place:
        table, run = Path(place) / "held-out.csv", Path(place) / "run"
        root = Path(os.environ["NEARKIN_BENCH_PHOTOS"]) / data
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *_held_out(root, images)])
        words = ["-m", "nearkin", "train", str(table), "--val-split", "0", "--epochs", str(epochs)]
        words += ["--seed", str(seed), "--out", str(run), "--quiet", "--json"]
        began = time.monotonic()
        command = ["taskset", "-c", str(core), sys.executable, *words, *SETTINGS[name].split()]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = round(time.monotonic() - began, 1)
    found = json.loads(done.stdout)
    scores = round(found["test_top1"], 4), round(found["metrics"]["log_loss"], 4)
    values = ("nearkin", cell, seed, name, SETTINGS[name], *scores, found["metrics"]["n"], seconds)
    return dict(zip(FIELDS, values, strict=True))


def _held_out(root: Path, images: int | None) -> Iterator[tuple[str, str, str]]:
    """Rows of a table: `images` of each class (four fifths where it is None) to train, the others to judge."""
    for folder in sorted((root / "train").iterdir()):
        files = sorted(folder.iterdir())
        random.Random(f"{folder.name} 0").shuffle(files)
        kept = round(0.8 * len(files)) if images is None else images
        for place, file in enumerate(files):
            yield str(file), folder.name, "train" if place < kept else "test"
    for file in sorted((root / "val").glob("*/*")):
        yield str(file), file.parent.name, "test"


if __name__ == "__main__":
    main()
