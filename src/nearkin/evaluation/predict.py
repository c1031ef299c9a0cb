"""`nearkin.load` and `nearkin.predict`: a trained model on image files. Imports torch only to compute."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nearkin.data.sources.folders import HIDDEN, find_images, image_suffixes
from nearkin.errors import ConfigError, DataError, ModelError, counted, printable
from nearkin.evaluation.options import (
    EVIDENCE,
    Device,
    Tta,
    check_choice,
    check_run,
    check_share,
)
from nearkin.evaluation.results import Prediction

if TYPE_CHECKING:
    from nearkin.evaluation.classifier import Classifier


def load(
    run: str | Path,
    *,
    kin: int = 3,
    reject: float | None = None,
    sets: float | None = None,
    tta: Tta = "none",
    device: Device = "auto",
) -> Classifier:
    """The classifier of a run folder, or of any folder with its model.json and model.safetensors.

    kin: nearest training images to name. reject: label images `unknown` that are farther from their kin than the share
    1 - reject of the validation images. sets: confidence of prediction sets. tta: views, as in `evaluate`.
    Evidence needs kin.safetensors, which every training writes; `Classifier.notes` says what is missing.

    Raises ModelError when `run` has no finished model, or `reject` or `sets` are given and kin.safetensors or
    validation images are missing; ConfigError for an option out of range.
    """
    check_arguments(run, tta, device, kin=kin, reject=reject, sets=sets)
    from nearkin.evaluation.classifier import load_classifier

    return load_classifier(Path(run), kin=kin, reject=reject, sets=sets, tta=tta, device=device)


def predict(
    run: str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    kin: int = 3,
    reject: float | None = None,
    sets: float | None = None,
    tta: Tta = "none",
    device: Device = "auto",
) -> Iterator[Prediction]:
    """The class of each image file and the evidence for it: of one path or many.

    Folders are searched with the rules of `train`; a path that does not exist may be a pattern such as `new/*.jpg`.
    A file that cannot be read gives a Prediction with `error`. Other options: as in `load`; precision: as in
    `evaluate`.

    Raises as `load`, and DataError when a path does not exist or holds no images: before the first Prediction.
    """
    check_arguments(run, tta, device, kin=kin, reject=reject, sets=sets)
    files, _ = find_files(paths)
    model = load(run, kin=kin, reject=reject, sets=sets, tta=tta, device=device)
    return chain.from_iterable(model.batches(files))


def check_arguments(
    run: str | Path,
    tta: str,
    device: str,
    *,
    kin: int = 0,
    reject: float | None = None,
    sets: float | None = None,
    explain: bool = False,
) -> None:
    """Raises what `load` raises for these arguments, as far as it is known without torch."""
    check_choice("tta", tta, Tta)
    check_choice("device", device, Device)
    check_share("reject", reject)
    check_share("sets", sets)
    if kin < 0:
        raise ConfigError(f"--kin {kin} is not possible; give a number from 0.")
    needs = {"reject": reject, "sets": sets, "explain": explain or None}
    given = [name for name, value in needs.items() if value is not None]
    if tta != "none" and (reject or sets):
        raise ConfigError(
            f"--{given[0]} compares with validation images of one view; leave --tta {tta} out."
        )
    check_run(Path(run))
    if given and not (Path(run) / EVIDENCE).is_file():
        raise ModelError(
            f"--{given[0]} needs {EVIDENCE}, which {printable(str(run))} does not have (it was imported, or trained by "
            "an earlier version); train it anew."
        )


def find_files(paths: str | Path | Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """The image files among `paths` and in folders among them, in order, and what the folders hold besides.

    A path to a file is taken whatever its name. A path that does not exist may be a pattern (`*`, `?`, `[...]`, and
    `**` for folders at any depth): it stands for the images that match and those in folders that match, sorted, each
    once.

    Raises DataError when a path does not exist or a folder or pattern holds no images.
    """
    files: list[str] = []
    notes: list[str] = []
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = os.fspath(given)
        if os.path.isdir(path):  # noqa: PTH112 - a Path would change how names are shown
            found = find_images(path)
            files += found.files
            notes += [f"{printable(path)}: {note}" for note in found.notes]
        elif os.path.lexists(path):
            files.append(path)
        elif glob.has_magic(path):
            files += _matching(path, notes)
        else:
            raise DataError(f"{printable(path)} does not exist; give image files or folders.")
    return files, notes


def _matching(pattern: str, notes: list[str]) -> list[str]:
    files: dict[str, None] = {}
    others = hidden = 0
    hides = _Hiding(pattern)
    for path in sorted(glob.glob(pattern, recursive=True), key=os.fsencode):  # noqa: PTH207
        if hides(path):
            hidden += 1
        elif os.path.isdir(path):  # noqa: PTH112
            try:
                inside = find_images(path).files
                files |= dict.fromkeys(file for file in inside if not hides(file))
            except DataError as error:
                notes.append(str(error))
        elif os.path.splitext(path)[1].lower() in image_suffixes():  # noqa: PTH122
            files[path] = None
        else:
            others += 1
    if not files:
        raise DataError(f"The pattern {printable(pattern)} matches no image.")
    if others:
        words = "file that is no image is", "files that are no images are"
        notes.append(f"{printable(pattern)}: {counted(others, *words)} left out")
    if hidden:
        words = "hidden match is", "hidden matches are"
        notes.append(f"{printable(pattern)}: {counted(hidden, *words)} left out")
    return list(files)


class _Hiding:
    """Whether `find_images` would not come to a path that matches a pattern: a folder on the way has a name that is
    left out, which the pattern does not give itself, or is a link to a folder above it."""

    def __init__(self, pattern: str) -> None:
        self._left_out = HIDDEN - set(Path(pattern).parts)
        self._known = {Path(), Path("/")}  # folders that are not hidden

    def __call__(self, path: str) -> bool:
        place = Path(path)
        folder = place if place.is_dir() else place.parent
        return place.name in self._left_out or self._folder(folder)

    def _folder(self, place: Path) -> bool:
        if place in self._known or place.parent == place:
            return False
        above = place.parent
        if place.name in self._left_out or self._folder(above):
            return True
        if place.is_symlink() and above.resolve().is_relative_to(place.resolve()):
            return True
        self._known.add(place)
        return False
