"""The class of each image file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nearkin.data.decode import BadImage, read_image
from nearkin.data.sources.folders import IMAGE_SUFFIXES
from nearkin.distributed import choose_device
from nearkin.errors import DataError, printable
from nearkin.evaluation.ensemble import BATCH
from nearkin.evaluation.evaluator import mean_probabilities
from nearkin.evaluation.model import Bundle, load_bundle
from nearkin.evaluation.tta import COUNTS, Tta, tta_views, unknown_tta


class Guess(NamedTuple):
    """What the model says of one file; `error` says why it says nothing."""

    path: str
    label: str | None
    probability: float | None
    top5: tuple[tuple[str, float], ...]
    error: str = ""


def predict(
    run: str | Path,
    paths: Iterable[str | Path],
    *,
    tta: Tta = "none",
    device: str = "auto",
) -> Iterator[Guess]:
    """The class of each image file, folders searched through; an unreadable file gives a Guess with `error`.

    tta: as in `evaluate`.

    Raises ModelError when `run` has no finished model, DataError when a path does not exist or holds no images,
    ConfigError for other views.
    """
    if tta not in COUNTS:
        raise unknown_tta(tta)
    chosen = torch.device(choose_device(device))
    bundle = load_bundle(Path(run), chosen)
    size = BATCH // COUNTS[tta]
    files = [file for path in paths for file in _files(Path(path))]
    parts = (files[start : start + size] for start in range(0, len(files), size))
    return (guess for part in parts for guess in _guesses(bundle, part, tta, chosen))


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
def _guesses(
    bundle: Bundle, files: Sequence[Path], tta: Tta, device: torch.device
) -> Iterator[Guess]:
    spec = bundle.description.spec
    views = tta_views(tta, bundle.description.transform)
    good, images, errors = [], [], {}
    for file in files:
        try:
            images.append(views(read_image(file, channels=spec.channels)))
            good.append(file)
        except BadImage as error:
            errors[file] = error.reason
    probabilities = {}
    if images:
        batch = torch.stack([view for same in zip(*images, strict=True) for view in same])
        rows = mean_probabilities(bundle.network(batch.to(device)).logits, len(good))
        probabilities = dict(zip(good, rows.cpu(), strict=True))
    for file in files:
        if file in errors:
            yield Guess(str(file), None, None, (), errors[file])
        else:
            yield _guess(file, probabilities[file], bundle.classes)


def _guess(file: Path, probabilities: torch.Tensor, classes: tuple[str, ...]) -> Guess:
    values, order = probabilities.topk(min(5, len(classes)))
    top5 = tuple((classes[c], v) for c, v in zip(order.tolist(), values.tolist(), strict=True))
    return Guess(str(file), top5[0][0], top5[0][1], top5)
