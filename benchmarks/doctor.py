"""The doctor: one pass over generated photographs beside one decode of each, and its ranking of planted wrong labels.

`python -m benchmarks doctor`, and `python -m benchmarks.doctor DATA [RUN]` for the labels.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.bench import Call, Row, Table, alternate, ratio
from benchmarks.look import listed, on_all_cores, photographs, remembered_in
from nearkin.data.dataset import choose
from nearkin.data.decode import decoded
from nearkin.data.sources.resolve import resolve
from nearkin.doctor.duplicates import find_copies
from nearkin.doctor.features import describe
from nearkin.doctor.inventory import Inventory
from nearkin.doctor.scan import scan
from nearkin.evaluation.suspects import suspects

FILES = int(os.environ.get("NEARKIN_BENCH_FILES", "10000"))
RUNS = 3
WRONG = 0.1


def inventory(data: str) -> Inventory:
    listing = resolve(data)
    return Inventory.of(
        choose(listing, channels="auto", val_split=0.0, seed=0, images_per_class=None)
    )


def _processor_time() -> float:
    """Seconds, of children too."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def table() -> Table:
    with tempfile.TemporaryDirectory() as place, remembered_in(Path(place) / "cache"):
        root = photographs(Path(place) / "photos", FILES, 200, 200)
        paths, images = list(listed(root).files), inventory(str(root))
        calls: dict[str, Call] = {
            "doctor": lambda: find_copies(scan(images), None),
            "decode": lambda: on_all_cores(lambda path: decoded(path, 3), paths),
        }
        what = f"{FILES} JPEGs of 200 x 200: all checks of pixels / one decode of each file"
        wall = alternate(calls, RUNS)
        cpu = alternate(calls, RUNS, clock=_processor_time)
        rows: list[Row] = [
            ratio(wall, "doctor", "decode", what, 1.5),
            ratio(cpu, "doctor", "decode", f"{what}, processor time"),
        ]
    return Table("Doctor", "files in the page cache, without a network", rows)


def labels(data: str, run: str | None) -> None:
    """Print how many of the first `n` suspicious labels are among the `n` that were made wrong."""
    images = inventory(data)
    seen = scan(images)
    place = None if run is None else Path(run)
    found = describe(images, resolve(data), seen, run=place, device="auto", quiet=False)
    true = images.labels[seen.readable]
    classes = len(images.classes)
    for seed in range(3):
        draw = np.random.default_rng(seed)
        wrong = draw.choice(len(true), int(WRONG * len(true)), replace=False)
        given = true.copy()
        given[wrong] = (true[wrong] + draw.integers(1, classes, len(wrong))) % classes
        result = suspects(found.features, given, classes)
        first = np.isin(result.ranking[: len(wrong)], wrong).mean()
        chosen = np.flatnonzero(result.suspicious)
        right = np.isin(chosen, wrong).mean() if len(chosen) else 0.0
        print(
            f"seed {seed}: {len(wrong)} wrong of {len(true)}; precision at that number {first:.3f}; "
            f"{len(chosen)} reported, of which {right:.3f} are wrong"
        )
    clean = suspects(found.features, true, classes).suspicious.sum()
    print(f"labels as they are: {clean} of {len(true)} reported")


if __name__ == "__main__":
    labels(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
