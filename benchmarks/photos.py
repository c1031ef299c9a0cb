"""Photos: what the default command reaches in 15 minutes, beside its probe and plain fine-tuning of the same weights.

The data sets are not part of the project: NEARKIN_BENCH_PHOTOS names a folder with `grocery81` and `clothing10`, each
with train/, val/ and test/. Every run is a process of its own, and its result is appended to docs/data/photos.csv;
what is there is not run again, so the table can be made in pieces. NEARKIN_BENCH_SEEDS (3) and NEARKIN_BENCH_METHODS
(all) make it smaller. Probe and default are given the machine for themselves; plain fine-tuning, whose budget is
processor time, runs once on each core at a time, afterwards.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import Row, Table, append_row, read_rows
from benchmarks.search import one_per_core

RESULTS = Path("docs/data/photos.csv")
FIELDS = ("cell", "method", "seed", "test_top1", "val_top1", "seconds", "detail")
# Name: folder, images per class, least accuracy of the default command.
CELLS: dict[str, tuple[str, int | None, float | None]] = {
    "grocery81, 5 per class": ("grocery81", 5, 69.0),
    "grocery81, 20 per class": ("grocery81", 20, 78.0),
    "grocery81, all": ("grocery81", None, 80.0),
    "clothing10, all": ("clothing10", None, None),
}
OVER_PROBE = 5.0  # points that clothing10 must be above its probe
METHODS = ("probe", "default", "plain")
LONGEST = 1.2 * 15 * 60  # seconds of a default run: `--minutes` holds within a fifth
GENERATED, FIRST_MODEL = (
    "2 500 generated photos",
    180.0,
)  # seconds to the first model, from the start of the process


def table() -> Table:
    """Run what is missing, then the table of all that is there."""
    root = os.environ.get("NEARKIN_BENCH_PHOTOS")
    seeds = range(int(os.environ.get("NEARKIN_BENCH_SEEDS", "3")))
    methods = os.environ.get("NEARKIN_BENCH_METHODS", ",".join(METHODS)).split(",")
    if root is not None:
        wanted = [
            (cell, method, seed)
            for seed in seeds
            for cell in CELLS
            for method in methods
            if not any(_is(row, cell, method, seed) for row in read_rows(RESULTS))
        ]
        if "probe" in methods and not any(row["cell"] == GENERATED for row in read_rows(RESULTS)):
            with tempfile.TemporaryDirectory() as place:
                generate(Path(place))
                append_row(RESULTS, _run(Path(place), GENERATED, "probe", 0))
        for job in wanted:
            if job[1] != "plain":
                append_row(RESULTS, _run(Path(root), *job))
        one_per_core(
            lambda job, core: append_row(RESULTS, _run(Path(root), *job, core)),
            [job for job in wanted if job[1] == "plain"],
        )
    return Table(
        "Photos",
        "test top-1 in %, mean over seeds, of whole processes on this machine; n = runs; medians = standard deviation",
        [row for cell in CELLS for row in _shown(cell)] + _times(),
    )


def generate(root: Path) -> None:
    """10 kinds of 250 photos of 500 x 375 pixels: blurred noise with stripes, one direction for each kind."""
    import numpy as np
    from PIL import Image, ImageFilter

    down, across = np.mgrid[:375, :500]
    for kind in range(10):
        folder = root / GENERATED / f"kind{kind}"
        folder.mkdir(parents=True)
        for number in range(250):
            rng = np.random.default_rng(1000 * kind + number)
            angle = np.pi * (kind + rng.random()) / 10
            wave = np.sin((across * np.cos(angle) + down * np.sin(angle)) / (6 + 6 * rng.random()))
            pixels = 128 + 40 * wave[..., None] + 60 * rng.normal(size=(375, 500, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{number}.jpg", quality=90)


def _is(row: dict[str, str], cell: str, method: str, seed: int) -> bool:
    return (row["cell"], row["method"], row["seed"]) == (cell, method, str(seed))


def _run(root: Path, cell: str, method: str, seed: int, core: int | None = None) -> dict[str, Any]:
    name, limit, _ = CELLS.get(cell, (cell, None, None))
    options = ["--seed", str(seed)]
    if limit is not None:
        options += ["--images-per-class", str(limit)]
    with tempfile.TemporaryDirectory() as place:
        # A cache of its own: the time is that of a first run.
        environment = os.environ | {"NEARKIN_CACHE_DIR": str(Path(place) / "cache")}
        run = Path(place) / "run"
        words = {
            "probe": ["nearkin", "train", "--epochs", "0", "--json", "--out", str(run)],
            "default": ["nearkin", "train", "--json", "--out", str(run)],
            "plain": ["benchmarks.plain_finetuning"],
        }[method]
        began = time.monotonic()
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        command = [*pinned, sys.executable, "-m", *words, str(root / name), *options]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.monotonic() - began
        result = json.loads(done.stdout)
        detail = result["detail"] if method == "plain" else _detail(run)
        val = result["val_top1"] if method == "plain" else _best(run)
    values = (cell, method, seed, result["test_top1"], val, round(seconds, 1), detail)
    return dict(zip(FIELDS, values, strict=True))


def _detail(run: Path) -> str:
    """What the run chose."""
    import yaml

    settings = yaml.safe_load((run / "config.yaml").read_text())
    name = settings["objective"]["name"]
    return f"{name}, {settings['epochs']} epochs, {settings['blocks']} blocks"


def _best(run: Path) -> float:
    best: float = json.loads((run / "status.json").read_text())["best"]["value"]
    return best


def _shown(cell: str) -> list[Row]:
    rows, means = [], {}
    for method in METHODS:
        found = [r for r in read_rows(RESULTS) if (r["cell"], r["method"]) == (cell, method)]
        if not found:
            continue
        values = [100 * float(r["test_top1"]) for r in found]
        means[method] = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else None
        target = CELLS[cell][2] if method == "default" else None
        if method == "default" and target is None and "probe" in means:
            target = means["probe"] + OVER_PROBE
        seconds = max(float(r["seconds"]) for r in found)
        row = Row(f"{cell}: {method}", means[method], spread, target, True, "%", ours=seconds)
        row.runs = len(values)
        rows.append(row)
    if {"default", "plain"} <= set(means):
        above = means["default"] - means["plain"]
        rows.append(Row(f"{cell}: default above plain", above, None, 0.0, True, "points"))
    return rows


def _times() -> list[Row]:
    """The time until the first model, and that of the longest default run."""
    found = read_rows(RESULTS)
    first = [float(row["seconds"]) for row in found if row["cell"] == GENERATED]
    default = [float(row["seconds"]) for row in found if row["method"] == "default"]
    rows = []
    if first:
        rows.append(Row(f"{GENERATED}: first model", first[0], None, FIRST_MODEL, unit="s"))
    if default:
        rows.append(Row("longest default run", max(default), None, LONGEST, unit="s"))
    return rows
