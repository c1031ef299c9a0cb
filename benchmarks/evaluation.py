"""Evaluation of a model, and the share of a run that validation, checkpoints and its end take."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.bench import Call, Row, Table, alternate, fastest, ratio
from nearkin import evaluate, train
from nearkin.evaluation.ensemble import FOLDER
from nearkin.training import prepare, trainer
from nearkin.training.checkpoint.saver import Saver
from nearkin.training.metrics_log import METRICS, read_metrics

RUNS = 7  # TenCrop takes about ten times as long as its peer
MODEL, SIDE, PIXELS = "resnet18", 64, (160, 120)
IMAGES = 192  # whole batches with one view and with ten
RUN: dict[str, Any] = {}  # options of the run whose shares are measured: the default run


def pictures(folder: Path) -> Path:
    """JPEG files in class folders: a few to train on, `IMAGES` to evaluate."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", IMAGES)):
        for number in range(count):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(PIXELS).save(place / f"{number}.jpg", quality=90)
    return folder


def trained(data: Path, run: Path, seed: int) -> Path:
    """A run folder to evaluate. Its accuracy does not matter here."""
    options: dict[str, Any] = {"model": MODEL, "image_size": SIDE, "epochs": 1, "workers": 0}
    threads = torch.get_num_threads()
    train(data, "ce", out=run, seed=seed, val_split=0, batch_size=16, threads=threads, **options)
    return run


def evaluation(place: Path) -> list[Row]:
    data = pictures(place / "data")
    runs = [trained(data, place / f"run{seed}", seed) for seed in range(2)]

    def first() -> None:
        for run in runs:
            shutil.rmtree(run / FOLDER, ignore_errors=True)
        evaluate(runs)

    calls: dict[str, Call] = {
        "one": partial(evaluate, runs[0], cache=False),
        "ten": partial(evaluate, runs[0], tta="tencrop", cache=False),
        "first": first,
        "again": partial(evaluate, runs),  # after `first`, which stored its predictions
    }
    seconds = alternate(calls, RUNS)
    return [
        fastest(seconds, "one", f"nearkin evaluate of {IMAGES} files, one view"),
        ratio(seconds, "ten", "one", "TenCrop against one view", 10.5),
        fastest(seconds, "first", "ensemble of two runs, nothing cached"),
        ratio(seconds, "again", "first", "the ensemble again, from cached predictions", 0.5),
    ]


@contextmanager
def watched(owner: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds inside `owner.name` to `spent[name]`."""
    inner: Callable[..., Any] = getattr(owner, name)
    spent[name] = 0.0

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, inner)


def shares(run: Path) -> list[Row]:
    """The parts of one run in this process that are not training."""
    spent: dict[str, float] = {}
    with (
        watched(prepare, "prepare", spent),
        watched(Saver, "save", spent),
        watched(trainer, "see", spent),
        watched(trainer, "collect", spent),
        watched(trainer.Trainer, "_report", spent),
        watched(trainer, "write_predictions", spent),
        watched(trainer, "write_tables", spent),
        watched(trainer, "save_bundle", spent),
    ):
        start = time.perf_counter()
        train(out=run, **RUN)
        whole = time.perf_counter() - start
    events = read_metrics(run / METRICS)
    looked = sum(e["clock"]["seconds"] for e in events if e["kind"] == "validation")
    files = sum(spent[name] for name in ("write_predictions", "write_tables", "save_bundle"))

    def share(what: str, seconds: float, target: float | None = None) -> Row:
        return Row(f"its {what}", 100 * seconds / whole, None, target, False, "%")

    return [
        Row("a default run on digits", whole, unit="s"),
        share("validation", looked),
        share("checkpoints", spent["save"]),
        share("validation and checkpoints", looked + spent["save"], 10),
        share("data and model, before the first step", spent["prepare"]),
        share("test split", spent["see"]),
        share("training images as evidence", spent["collect"]),
        share("report", spent["_report"]),
        share("model and prediction files", files),
    ]


def table() -> Table:
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        try:
            rows = evaluation(Path(name)) + shares(Path(name) / "default")
        finally:
            torch.set_num_threads(threads)  # a run chooses its own
    setting = (
        f"{IMAGES} JPEG files of {PIXELS[0]} x {PIXELS[1]} in batches of 64 views, {MODEL} at {SIDE} px, "
        f"{threads} threads; files are checked, decoded and evaluated; shares of one default run on one thread"
    )
    return Table("Evaluation", setting, rows)
