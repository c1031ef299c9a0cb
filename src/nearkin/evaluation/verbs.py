"""Using a trained model: exact metrics of a split, and classes of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, validate
from nearkin.data import IMAGE_SUFFIXES, BadImage, eval_transform, load_for_evaluation, read_image
from nearkin.errors import DataError, printable
from nearkin.evaluation.bundle import Bundle, load_bundle
from nearkin.evaluation.judge import Judge
from nearkin.evaluation.metrics import summarise
from nearkin.runtime import Runtime, choose_device

BATCH = 64


class Guess(NamedTuple):
    """What the model says of one file; `error` says why it says nothing."""

    path: str
    label: str | None
    probability: float | None
    top5: tuple[tuple[str, float], ...]
    error: str = ""


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    device: str = "auto",
    workers: int = 0,
) -> dict[str, Any]:
    """Exact metrics of the model in a run folder.

    data: by default the run's own, with the same splits. split: by default test, else val; the result names it.
    Raises ModelError when `run` has no finished model, DataError when data or split do not fit its classes.
    """
    run = Path(run)
    runtime = Runtime(device=choose_device(device), precision="fp32")
    try:
        bundle = load_bundle(run, runtime.device)
        config: RunConfig = validate(RunConfig, read_yaml(run / CONFIG_FILE))
        found = load_for_evaluation(
            config.data if data is None else str(data),
            classes=bundle.classes,
            channels=bundle.description.spec.channels,
            split=split,
            own=data is None,
            val_split=config.val_split,
            seed=config.seed,
            images_per_class=config.images_per_class,
            bad_images=config.bad_images,
        )
        spec = bundle.description.transform
        judge = Judge(runtime, spec, batch_size=BATCH, workers=workers)
        predictions = judge.predictions(bundle.network, found.split)
        summary = summarise(predictions, bundle.classes)
        return {"run": str(run), "split": found.split.name, "notes": list(found.notes)} | summary
    finally:
        runtime.close()


def predict(
    run: str | Path, paths: Iterable[str | Path], *, device: str = "auto"
) -> Iterator[Guess]:
    """The class of each image file, folders searched through; an unreadable file gives a Guess with `error`.

    Raises ModelError when `run` has no finished model, DataError when a path does not exist or holds no images.
    """
    chosen = torch.device(choose_device(device))
    bundle = load_bundle(Path(run), chosen)
    files = [file for path in paths for file in _files(Path(path))]
    parts = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    return (guess for part in parts for guess in _guesses(bundle, part, chosen))


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        if not os.path.lexists(path):
            raise DataError(f"{printable(str(path))} does not exist; give image files or folders.")
        yield path
        return
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    if not found:
        raise DataError(f"The folder {printable(str(path))} holds no images.")
    yield from found


@torch.inference_mode()
def _guesses(bundle: Bundle, files: Sequence[Path], device: torch.device) -> Iterator[Guess]:
    spec = bundle.description.spec
    transform = eval_transform(bundle.description.transform)
    good, images, errors = [], [], {}
    for file in files:
        try:
            images.append(transform(read_image(file, channels=spec.channels)))
            good.append(file)
        except BadImage as error:
            errors[file] = error.reason
    rows = bundle.network(torch.stack(images).to(device)).logits if images else None
    probabilities = (
        {} if rows is None else dict(zip(good, rows.float().softmax(1).cpu(), strict=True))
    )
    for file in files:
        if file in errors:
            yield Guess(str(file), None, None, (), errors[file])
        else:
            yield _guess(file, probabilities[file], bundle.classes)


def _guess(file: Path, probabilities: torch.Tensor, classes: tuple[str, ...]) -> Guess:
    values, order = probabilities.topk(min(5, len(classes)))
    top5 = tuple((classes[c], v) for c, v in zip(order.tolist(), values.tolist(), strict=True))
    return Guess(str(file), top5[0][0], top5[0][1], top5)
