"""How time and memory grow with batch, bank, classes and images: `python -m benchmarks.growth --json F --plot F.svg`.

Takes minutes and has no targets. Every point is a fresh process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

from benchmarks import bank, pairwise
from benchmarks.bench import Call, machine, output
from nearkin import functional as F
from nearkin.data.dataset import Dataset, Split
from nearkin.data.images import Files
from nearkin.data.sampling import TrainOrder
from nearkin.data.sources.listing import FileList

SIZES: dict[str, tuple[int, ...]] = {
    "anchors": (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
    "bank entries": (1024, 4096, 16_384, 65_536, 262_144, 1_048_576),
    "classes": (10, 40, 160, 640, 2560, 5120, 10_240, 21_000),
    "images": (1000, 4000, 16_000, 64_000, 256_000, 1_000_000),
}
LEAST, MOST, ENOUGH = 2, 5, 1.5  # fewest and most runs of a point; no further run after 1.5 s
ANCHORS, ENTRIES, GPACO_ENTRIES, CLASSES = 4096, 16_384, 4096, 100  # where they are constant


class Study(NamedTuple):
    """prepared: a size on the axis -> the call to measure. setting: the constants."""

    axis: str
    setting: str
    prepared: Callable[[int], Call]


class Point(NamedTuple):
    """One size. seconds: of each run after the first. extra: MiB that the first run adds to the peak."""

    size: int
    seconds: list[float]
    extra: float


def _pairs(name: str, samples: int) -> Call:
    return pairwise.prepared(pairwise.LOSSES[name], samples)()


def _supcon(classes: int) -> Call:
    features, _ = pairwise.batch(ANCHORS)
    labels = torch.arange(ANCHORS) % classes
    return partial(pairwise.step, pairwise.LOSSES["SupCon (out)"], features, labels)


def _bank(entries: int, classes: int) -> Call:
    # Sets the module's sizes; this process uses it for nothing else.
    bank.ENTRIES, bank.CLASSES, bank.TOPK = entries, classes, min(512, entries // 4)
    return bank.PEAK["bf16"]()


def _ce(classes: int) -> Call:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(256, classes, generator=draw)
    labels = torch.randint(classes, (256,), generator=draw)
    return partial(pairwise.step, F.cross_entropy, logits, labels)


def _gpaco(classes: int) -> Call:
    draw = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(64, 128, generator=draw), dim=1)
    keys = normalize(torch.randn(GPACO_ENTRIES, 128, generator=draw), dim=1)
    own, stored = (torch.randint(classes, (n,), generator=draw) for n in (64, GPACO_ENTRIES))
    logits = torch.randn(64, classes, generator=draw)

    def call() -> None:
        leaves = features.clone().requires_grad_(), logits.clone().requires_grad_()
        losses = F.gpaco(
            leaves[0], own, leaves[1], keys, stored, alpha=0.05, temperature=0.2, smoothing=0.0
        )
        torch.autograd.backward(F.mean_valid(losses))

    return call


def _names(images: int) -> Iterator[str]:
    return (f"class{i % CLASSES:03d}/image{i:07d}.jpg" for i in range(images))


def _files(images: int) -> Files:
    return Files(FileList.pack("nowhere", map(str.encode, _names(images))))


def _order(images: int) -> Call:
    return lambda: next(iter(TrainOrder(images, seed=0, batch_size=128, first=0, last=1)))


def _listing(images: int) -> Call:
    return lambda: _files(images)


def _fingerprint(images: int) -> Call:
    classes = tuple(f"class{i:03d}" for i in range(CLASSES))
    split = Split("train", _files(images), np.arange(images) % CLASSES, classes)
    data = Dataset("nowhere", {"train": split})
    return lambda: data.fingerprint


STUDIES: dict[str, Study] = {
    **{
        name: Study("anchors", "d = 128, 100 classes, forward + backward", partial(_pairs, name))
        for name in ("SupCon (out)", "SCHaNe, hardness 1")
    },
    "CoNe's bank": Study(
        "bank entries",
        "B = 64, d = 256, C = 100, bf16, both terms, forward + backward + update",
        partial(_bank, classes=CLASSES),
    ),
    "cross-entropy": Study("classes", "256 rows of logits, forward + backward", _ce),
    "SupCon (out), by class": Study("classes", f"{ANCHORS} anchors, d = 128", _supcon),
    "CoNe's bank, by class": Study(
        "classes", f"B = 64, d = 256, {ENTRIES} entries in bf16", partial(_bank, ENTRIES)
    ),
    "GPaCo": Study("classes", f"B = 64, d = 128, {GPACO_ENTRIES} entries", _gpaco),
    "epoch order": Study("images", "shuffled, up to the first batch of 128", _order),
    "listing": Study("images", "names packed in memory", _listing),
    "fingerprint": Study("images", "names without files, one stat each", _fingerprint),
}


def measure(name: str, size: int, threads: int) -> Point:
    """One point, to be called in a fresh process."""
    torch.set_num_threads(threads)
    call = STUDIES[name].prepared(size)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    before = _peak()
    call()
    extra = max(0, _peak() - before) / 1024  # two readings may differ by some pages
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < ENOUGH):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Point(size, seconds, extra)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def fresh(name: str, size: int, threads: int) -> Point:
    """`measure` in a fresh process, forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bank", "benchmarks.pairwise", "nearkin.data"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, name, size, threads).result()


def exponent(points: list[Point]) -> float:
    """The slope of log minimum time over log size, by least squares over the upper half of the sizes."""
    upper = points[-max(2, len(points) // 2) :]
    sizes = [math.log(p.size) for p in upper]
    return statistics.linear_regression(sizes, [math.log(min(p.seconds)) for p in upper]).slope


def show(name: str, points: list[Point]) -> str:
    study = STUDIES[name]
    head = f"\n{name}: time ~ {study.axis}^{exponent(points):.2f}\n  {study.setting}"
    rows = [
        f"  {p.size:>9} {study.axis:<13} {1000 * min(p.seconds):>10.2f} ms "
        f"(median {1000 * statistics.median(p.seconds):.2f}, n = {len(p.seconds)}) {p.extra:>8.1f} MiB extra"
        for p in points
    ]
    return "\n".join([head, *rows])


def as_json(name: str, points: list[Point]) -> dict[str, Any]:
    rows = [
        {
            "size": p.size,
            "minimum": min(p.seconds),
            "median": statistics.median(p.seconds),
            "n": len(p.seconds),
            "extra_mib": p.extra,
        }
        for p in points
    ]
    study = STUDIES[name]
    about = {"name": name, "axis": study.axis, "setting": study.setting}
    return about | {"exponent": exponent(points), "points": rows}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--json", type=output, required=True, help="write the numbers here")
    parser.add_argument("--plot", type=output, help="draw them here (SVG)")
    parser.add_argument("--drawn-again", action="store_true", help="draw --json, measure nothing")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; run with --group bench or leave it out")
    if given.drawn_again and not given.json.is_file():
        parser.error(f"--drawn-again needs the numbers of an earlier run; there is no {given.json}")
    if not given.drawn_again:
        torch.set_num_threads(given.threads)
        studies = []
        for name, study in STUDIES.items():
            points = [fresh(name, size, given.threads) for size in SIZES[study.axis]]
            print(show(name, points), flush=True)
            studies.append(as_json(name, points))
        content = {"machine": machine(), "studies": studies}
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    if given.plot:
        from benchmarks.growth_plot import draw

        draw(json.loads(given.json.read_text())["studies"], given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
