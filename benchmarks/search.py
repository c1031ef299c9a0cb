"""A search: short runs that differ in a few options, judged by images that were held out from training.

The test splits are not looked at. A setting is judged by the official validation images where there are any, and the
training images beyond so many per class, or a fifth of them where all are used. Every run keeps its last weights, so
nothing is chosen on these images but the setting. One run on each core at a time; each is one row of a CSV file, and
what is there is not run again.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from benchmarks.bench import append_row, read_rows

Job = TypeVar("Job")
MOST = 10_000  # training images that judge
FIELDS = (*("source", "cell", "seed", "name", "options", "top1", "log_loss", "images", "seconds"),)


def one_per_core(run: Callable[[Job, int], None], jobs: Sequence[Job]) -> None:
    """Call `run(job, core)` for each job, one at a time on each core."""
    cores: SimpleQueue[int] = SimpleQueue()
    for core in range(os.cpu_count() or 1):
        cores.put(core)

    def taken(job: Job) -> None:
        core = cores.get()
        try:
            run(job, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(taken, jobs))


class Cell(NamedTuple):
    """data: folder under `root`. images: to train on, per class; None is four fifths of all. options: of every run."""

    data: str
    images: int | None
    options: str


class Search(NamedTuple):
    """results: the CSV file. root: of the data sets. settings: name -> options. program: a module whose command line
    has `train`."""

    results: Path
    root: Path
    cells: Mapping[str, Cell]
    settings: Mapping[str, str]
    program: str = "nearkin"

    def make(self, wanted: Sequence[tuple[str, str]]) -> None:
        """Run the pairs of cell and setting that are not there yet."""

        def run(job: tuple[str, str], core: int) -> None:
            done = {(row["source"], row["cell"], row["name"]) for row in read_rows(self.results)}
            if ("nearkin", *job) not in done:
                append_row(self.results, self.run(*job, core))

        one_per_core(run, wanted)

    def run(self, cell: str, name: str, core: int, seed: int = 0) -> dict[str, Any]:
        """One row."""
        data, images, common = self.cells[cell]
        with tempfile.TemporaryDirectory() as place:
            table, run = Path(place) / "held-out.csv", Path(place) / "run"
            with table.open("w", newline="") as file:
                rows = held_out(self.root / data, images)
                csv.writer(file).writerows([("path", "label", "split"), *rows])
            words = ["-m", self.program, "train", str(table), "--val-split", "0", *common.split()]
            words += ["--seed", str(seed), "--out", str(run), "--quiet", "--json"]
            began = time.monotonic()
            command = ["taskset", "-c", str(core), sys.executable, *words]
            command += self.settings[name].split()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds = round(time.monotonic() - began, 1)
        found = json.loads(done.stdout)
        scores = round(found["test_top1"], 4), round(found["metrics"]["log_loss"], 4)
        options, number = self.settings[name], found["metrics"]["n"]
        values = ("nearkin", cell, seed, name, options, *scores, number, seconds)
        return dict(zip(FIELDS, values, strict=True))


def held_out(root: Path, images: int | None) -> Iterator[tuple[str, str, str]]:
    """Rows of a table: `images` of each class to train, the others to judge."""
    folders = sorted((root / "train").iterdir())
    for folder in folders:
        files = sorted(folder.iterdir())
        random.Random(f"{folder.name} 0").shuffle(files)
        kept = round(0.8 * len(files)) if images is None else images
        for place, file in enumerate(files[: kept + MOST // len(folders)]):
            yield str(file), folder.name, "train" if place < kept else "test"
    for file in sorted((root / "val").glob("*/*")):
        yield str(file), file.parent.name, "test"
