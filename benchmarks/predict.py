"""Prediction from files against the network alone: decoding, evidence and rows beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import nearkin
from benchmarks.bench import Call, Row, Table, alternate, fastest, ratio
from benchmarks.evaluation import pictures
from nearkin.data.decode import decoded
from nearkin.data.loader import stacked
from nearkin.data.transforms import eval_transform
from nearkin.evaluation.classifier import BATCH
from nearkin.evaluation.model import load_bundle

RUNS = 7
OPTIONS: dict[str, Any] = {"model": "auto", "image_size": 160, "batch_size": 8}


def prediction(place: Path) -> Iterator[Row]:
    """Rows for a model that starts from the packaged weights and learns nothing."""
    data = pictures(place / "data")
    threads = torch.get_num_threads()
    run = nearkin.train(
        data, "ce", epochs=0, out=place / "run", threads=threads, workers=0, **OPTIONS
    ).run
    files = sorted((data / "test").rglob("*.jpg"))
    model, bundle = nearkin.load(run), load_bundle(run, torch.device("cpu"))
    transform = eval_transform(bundle.description.transform)
    images = [transform(decoded(file, 3)) for file in files]
    batches = [stacked(images[row : row + BATCH]) for row in range(0, len(images), BATCH)]

    @torch.inference_mode()
    def network() -> None:
        for batch in batches:
            bundle.network(batch)

    calls: dict[str, Call] = {"predict": lambda: list(model.batches(files)), "network": network}
    seconds = alternate(calls, RUNS)
    yield fastest(seconds, "network", f"the network alone on {len(files)} decoded images")
    yield ratio(seconds, "predict", "network", "predict from files, images/s", 0.8, higher=True)


def table() -> Table:
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        try:
            rows = list(prediction(Path(name)))
        finally:
            torch.set_num_threads(threads)  # a run chooses its own
    side, model = OPTIONS["image_size"], OPTIONS["model"]
    setting = (
        f"JPEG files of 160 x 120, model {model} at {side} px in batches of {BATCH}, {threads} threads; the network "
        "reads images that are decoded before"
    )
    return Table("Prediction", setting, rows)
