"""Which settings fine-tune best: runs of `nearkin train` that differ in one option, compared on validation.

    NEARKIN_BENCH_PHOTOS=FOLDER python -m benchmarks.photo_search [NAME ...]

Each run is a process of its own and one row of benchmarks/photo_search.csv; what is there is not run again. The test
split is not looked at. Rows with the source `prototype` come from a loop that was written before `--blocks` and
`--objective.attach` existed: the same network, crops and losses, shuffled or balanced batches of 32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import append_row, read_rows

RESULTS = Path("benchmarks/photo_search.csv")
FIELDS = (
    "source",
    "data",
    "images_per_class",
    "seed",
    "name",
    "val_top1",
    "val_log_loss",
    "seconds",
)
DATA: tuple[tuple[str, int | None], ...] = (
    ("grocery81", 5),
    ("grocery81", 20),
    ("grocery81", None),
    ("clothing10", None),
)
EPOCHS = {5: 30, 20: 12, None: 8}  # by images per class: about the same number of steps
# Each beside the default of a run from pretrained weights.
SETTINGS: dict[str, list[str]] = {
    "default": [],
    "ce": ["--objective", "ce"],
    "ce, shuffled, smoothing 0": ["--objective", "ce", "--objective.smoothing", "0"],
    "projection": ["--objective", "supcon", "--objective.attach", "projection"],
    "weight 0.25": ["--objective", "supcon", "--objective.weight", "0.25"],
    "weight 1": ["--objective", "supcon", "--objective.weight", "1"],
    "temperature 0.2": ["--objective", "supcon", "--objective.temperature", "0.2"],
    "two views": ["--objective", "supcon", "--objective.views", "2"],
    "sincere": ["--objective", "sincere"],
    "schane, mix 0.5": ["--objective", "schane", "--objective.mix", "0.5"],
    "opl": ["--objective", "opl"],
    "cone": ["--objective", "cone"],
    "shuffled": ["--sampler", "shuffle"],
    "2 blocks": ["--blocks", "2"],
    "all blocks": ["--blocks", "all"],
    "all blocks, layer decay 0.75": ["--blocks", "all", "--layer-decay", "0.75"],
    "lr 1e-4": ["--lr", "1e-4"],
    "lr 1e-3": ["--lr", "1e-3"],
    "head lr 1": ["--head-lr", "1"],
    "head lr 10": ["--head-lr", "10"],
    "weight decay 0.005": ["--weight-decay", "0.005"],
    "batch 64": ["--batch-size", "64"],
    "medium": ["--augment", "medium"],
    "crops from 0.2": ["--crop-scale", "0.2"],
    "averaged weights": ["--ema", "0.99"],
    "192 px": ["--image-size", "192"],
    "evaluation at 160 px": ["--eval-size", "160"],
    "evaluation at 224 px": ["--eval-size", "224"],
}


def main() -> None:
    names = sys.argv[1:] or list(SETTINGS)
    root = Path(os.environ["NEARKIN_BENCH_PHOTOS"])
    for name in names:
        for data, images in DATA:
            if not any(_is(row, data, images, name) for row in read_rows(RESULTS)):
                append_row(RESULTS, _run(root, data, images, name))


def _is(row: dict[str, str], data: str, images: int | None, name: str) -> bool:
    given = row["source"], row["data"], row["images_per_class"], row["name"]
    return given == ("nearkin", data, str(images or "all"), name)


def _run(root: Path, data: str, images: int | None, name: str, seed: int = 0) -> dict[str, Any]:
    options = ["--epochs", str(EPOCHS[images]), "--seed", str(seed), *SETTINGS[name]]
    if images is not None:
        options += ["--images-per-class", str(images)]
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        words = ["-m", "nearkin", "train", str(root / data), "--out", str(run), "--quiet"]
        began = time.monotonic()
        subprocess.run([sys.executable, *words, *options], check=True, stdout=subprocess.DEVNULL)
        seconds = round(time.monotonic() - began, 1)
        best = json.loads((run / "status.json").read_text())["best"]
    found = ("nearkin", data, images or "all", seed, name)
    values = (*found, round(best["value"], 4), round(best["log_loss"], 4), seconds)
    return dict(zip(FIELDS, values, strict=True))


if __name__ == "__main__":
    main()
