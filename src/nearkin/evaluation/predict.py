"""`nearkin.predict`: the class of each image file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    files, _ = find_files(paths)
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


def find_files(paths: str | Path | Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """The image files among `paths` and in folders among them, in order, and what the folders hold besides.

    A path to a file is taken whatever its name.

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
    return files, notes


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
    images: dict[str, tuple[torch.Tensor, ...]] = {}
    errors: dict[str, str] = {}
    for file in files:
        try:
            images[file] = views(read_image(file, channels=bundle.description.spec.channels))
        except BadImage as error:
            errors[file] = error.reason
    rows: dict[str, tuple[list[int], list[float]]] = {}
    if images:
        batch = torch.stack([view for same in zip(*images.values(), strict=True) for view in same])
        with torch.inference_mode():
            logits = bundle.network(batch.to(device)).logits
            columns = ranked(mean_probabilities(logits, len(images)))
        rows = dict(zip(images, zip(*(c.tolist() for c in columns), strict=True), strict=True))
    for file in files:
        if file in errors:
            yield Prediction(file, None, None, (), errors[file])
        else:
            classes, probabilities = rows[file]
            names = (bundle.classes[one] for one in classes)
            top5 = tuple(zip(names, probabilities, strict=True))
            yield Prediction(file, *top5[0], top5)
