"""Which settings fine-tune best: runs of `nearkin train` that differ from the default in one option.

    NEARKIN_BENCH_PHOTOS=FOLDER python -m benchmarks.photo_search [NAME ...]

All settings run on the first cell, those of ELSEWHERE on every cell; each is a row of benchmarks/photo_search.csv (see
`benchmarks.search`). Rows with the source `prototype` come from a loop that was written before `--blocks` and
`--objective.attach` existed, with the official validation images and the best epoch.
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
    root = Path(os.environ["NEARKIN_BENCH_PHOTOS"])
    Search(RESULTS, root, CELLS, SETTINGS).make(wanted)


if __name__ == "__main__":
    main()
