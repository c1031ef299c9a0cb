"""Which settings fine-tune best: runs of `nearkin train` that differ from the default in one option.

    NEARKIN_BENCH_PHOTOS=FOLDER python -m benchmarks.photo_search [NAME ...]

All settings run on the first cell, those of ELSEWHERE on every cell, those of LARGER_SETTINGS on that one; nothing is
chosen by the cell UNSEEN. Each is a row of benchmarks/photo_search.csv (see `benchmarks.search`). Rows with the source
`prototype` come from a loop that was written before `--blocks` and `--objective.attach` existed, with the official
validation images and the best epoch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.search import Cell, Search

RESULTS = Path("benchmarks/photo_search.csv")
CELLS = {
    "grocery81, 5 per class": Cell("grocery81", 5, "--epochs 20"),
    "grocery81, 20 per class": Cell("grocery81", 20, "--epochs 9"),
    "grocery81, all": Cell("grocery81", None, "--epochs 7"),
    "clothing10, all": Cell("clothing10", None, "--epochs 6"),
}
# 32 px, so the options that photos get by themselves are given.
PHOTO = (
    "--model tf_efficientnet_lite0 --pretrained --image-size 128 --eval-size 160 --eval-crop 0.875"
)
UNSEEN = "cifar10, 20 per class"
UNSEEN_CELL = Cell("cifar10", 20, f"{PHOTO} --crop-scale 0.35 --epochs 20")
# Beside the default of a run from pretrained weights: SupCon with weight 0.5 on the features. `ce` and `cone` shuffle
# by default; all are balanced here, unless it is said.
CE, CONE = "--objective ce --sampler balanced", "--objective cone --sampler balanced"
SCHANE = "--objective schane --objective.mix 0.5 --objective.views 1"
SETTINGS: dict[str, str] = {
    "default": "",
    "ce": CE,
    "ce, shuffled": "--objective ce",
    "ce, shuffled, averaged weights": "--objective ce --ema 0.98",
    "ce, lr 1e-4": f"{CE} --lr 1e-4",
    "ce, lr 1e-3": f"{CE} --lr 1e-3",
    "ce, batch 16": f"{CE} --batch-size 16",
    "ce, batch 128": f"{CE} --batch-size 128",
    "projection": "--objective supcon --objective.attach projection",
    "weight 1": "--objective supcon --objective.weight 1",
    "weight 2": "--objective supcon --objective.weight 2",
    "temperature 0.2": "--objective supcon --objective.temperature 0.2",
    "two views": "--objective supcon --objective.views 2",
    "sincere": "--objective sincere",
    "sincere, weight 1": "--objective sincere --objective.weight 1",
    "schane, published": "--objective schane --objective.mix 0.9 --objective.views 2",
    "schane, mix 0.5": SCHANE,
    "schane, mix 0.5, temperature 0.1": f"{SCHANE} --objective.temperature 0.1",
    "schane, mix 0.5, temperature 0.1, hardness 0": (
        f"{SCHANE} --objective.temperature 0.1 --objective.hardness 0"
    ),
    "schane, mix 0.5, temperature 0.1, lr 1e-3": (
        f"{SCHANE} --objective.temperature 0.1 --lr 1e-3"
    ),
    "sincere, lr 1e-3": "--objective sincere --lr 1e-3",
    "opl": "--objective opl",
    "opl, weight 0.5": "--objective opl --objective.weight 0.5",
    "opl, lr 1e-3": "--objective opl --lr 1e-3",
    "cone": CONE,
    "cone, shuffled": "--objective cone",
    "cone, neighbour weight 0.5": f"{CONE} --objective.neighbour-weight 0.5",
    "cone, lr 1e-3": f"{CONE} --lr 1e-3",
    "cone, projection, classifier on the features": f"{CONE} --objective.attach projection",
    "cone, projection, classifier on the embedding": (
        f"{CONE} --objective.attach projection --objective.classifier embedding"
    ),
    "shuffled": "--sampler shuffle",
    "2 blocks": "--blocks 2",
    "all blocks, layer decay 0.75": "--blocks all --layer-decay 0.75",
    "BatchNorm learns its statistics": "--no-freeze-batchnorm",
    "lr 1e-4": "--lr 1e-4",
    "lr 1e-3": "--lr 1e-3",
    "head lr 1": "--head-lr 1",
    "head lr 10": "--head-lr 10",
    "weight decay 0.005": "--weight-decay 0.005",
    "weight decay 0.2": "--weight-decay 0.2",
    "batch 16": "--batch-size 16",
    "batch 128": "--batch-size 128",
    "medium": "--augment medium",
    "crops from 0.2": "--crop-scale 0.2",
    "smoothing 0": "--objective supcon --objective.smoothing 0",
    "averaged weights": "--ema 0.98",
    "192 px, evaluation at 224 px": "--image-size 192 --eval-size 224",
    "40 epochs": "--epochs 40",
}
ELSEWHERE = ("default", "ce", "weight 1", "lr 1e-3")
LARGER = "grocery81, 20 per class"
LARGER_SETTINGS = {
    "batch 16": "--batch-size 16",
    "batch 256": "--batch-size 256",
    "batch 256, lr 2.4e-3": "--batch-size 256 --lr 2.4e-3",
    "sincere": "--objective sincere",
    "cone": CONE,
    "schane, mix 0.5, temperature 0.1": SETTINGS["schane, mix 0.5, temperature 0.1"],
}


def main() -> None:
    names = sys.argv[1:]
    first = next(iter(CELLS))
    wanted = [
        (cell, name) for cell in CELLS for name in SETTINGS if cell == first or name in ELSEWHERE
    ]
    wanted += [(LARGER, name) for name in LARGER_SETTINGS]
    wanted += [(UNSEEN, name) for name in ("default", "ce")]
    root = Path(os.environ["NEARKIN_BENCH_PHOTOS"])
    search = Search(RESULTS, root, CELLS | {UNSEEN: UNSEEN_CELL}, SETTINGS | LARGER_SETTINGS)
    search.make([job for job in wanted if not names or job[1] in names])


if __name__ == "__main__":
    main()
