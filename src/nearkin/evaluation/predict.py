"""`nearkin.predict`: the class of each image file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nearkin.data.sources.folders import find_images
from nearkin.errors import DataError, printable
from nearkin.evaluation.options import Device, Tta, check_choice, check_run
from nearkin.evaluation.results import Prediction

if TYPE_CHECKING:
    import torch

    from nearkin.evaluation.model import Bundle


def predict(
    run: str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    tta: Tta = "none",
    device: Device = "auto",
) -> Iterator[Prediction]:
    """The class of each image file: of one path or many; folders are searched with the rules of `train`.

    A file that cannot be read gives a Prediction with `error`. tta, precision: as in `evaluate`.

    Raises ModelError when `run` has no finished model, DataError when a path does not exist or holds no images,
    ConfigError for an unknown `tta` or `device`: at once, before the first Prediction.
    """
    check_arguments(run, tta, device)
    files = find_files(paths).files
    import torch

    from nearkin.distributed import choose_device
    from nearkin.evaluation.ensemble import BATCH
    from nearkin.evaluation.model import load_bundle
    from nearkin.evaluation.tta import COUNTS

    chosen = torch.device(choose_device(device))
    bundle = load_bundle(Path(run), chosen)
    size = BATCH // COUNTS[tta]
    parts = (files[start : start + size] for start in range(0, len(files), size))
    return (one for part in parts for one in _predictions(bundle, part, tta, chosen))


def check_arguments(run: str | Path, tta: str, device: str) -> None:
    """Raises what `predict` raises for these arguments."""
    check_choice("tta", tta, Tta)
    check_choice("device", device, Device)
    check_run(Path(run))


class FoundFiles(NamedTuple):
    """Image files in order, and sentences about what the folders hold besides."""

    files: list[str]
    notes: tuple[str, ...]


def find_files(paths: str | Path | Iterable[str | Path]) -> FoundFiles:
    """The image files among `paths` and in folders among them. A path to a file is taken whatever its name.

    Raises DataError when a path does not exist or a folder holds no images.
    """
    files: list[str] = []
    notes: list[str] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if os.path.isdir(path):  # noqa: PTH112 - a Path would change how names are shown
            found = find_images(str(path))
            files += found.files
            notes += [f"{printable(str(path))}: {note}" for note in found.notes]
        elif os.path.lexists(path):
            files.append(str(path))
        else:
            raise DataError(f"{printable(str(path))} does not exist; give image files or folders.")
    return FoundFiles(files, tuple(notes))


def _predictions(
    bundle: Bundle, files: Sequence[str], tta: Tta, device: torch.device
) -> Iterator[Prediction]:
    """The predictions for one batch of files, in their order."""
    import torch

    from nearkin.data.decode import BadImage, read_image
    from nearkin.evaluation.evaluator import mean_probabilities
    from nearkin.evaluation.metrics import ranked
    from nearkin.evaluation.tta import tta_views

    views = tta_views(tta, bundle.description.transform)
    images: list[tuple[torch.Tensor, ...]] = []
    errors: dict[int, str] = {}
    for number, file in enumerate(files):
        try:
            image = read_image(file, channels=bundle.description.spec.channels)
            images.append(views(image))
        except BadImage as error:
            errors[number] = error.reason
    tops: list[list[int]] = []
    values: list[list[float]] = []
    if images:
        batch = torch.stack([view for same in zip(*images, strict=True) for view in same])
        with torch.inference_mode():
            logits = bundle.network(batch.to(device)).logits
            tops, values = (c.tolist() for c in ranked(mean_probabilities(logits, len(images))))
    rows = zip(tops, values, strict=True)
    for number, file in enumerate(files):
        if number in errors:
            yield Prediction(file, None, None, (), errors[number])
            continue
        classes, probabilities = next(rows)
        names = (bundle.classes[one] for one in classes)
        top5 = tuple(zip(names, probabilities, strict=True))
        yield Prediction(file, *top5[0], top5)
