"""Built-in data sets: scikit-learn's digits, offline, and some of torchvision's, downloaded once."""

from __future__ import annotations

import contextlib
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.sources.listing import ArrayList, FileList, ListedSplit, Listing
from nearkin.errors import DataError, printable
from nearkin.files import CACHE, cache_folder


class _Source(NamedTuple):
    """A class of torchvision.datasets, and the arguments that choose each split."""

    kind: str
    splits: dict[str, dict[str, Any]]


_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_NAMED: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_TORCHVISION = {
    "cifar10": _Source("CIFAR10", _FLAG),
    "cifar100": _Source("CIFAR100", _FLAG),
    "fashion-mnist": _Source("FashionMNIST", _FLAG),
    "flowers102": _Source("Flowers102", _NAMED | {"val": {"split": "val"}}),
    "food101": _Source("Food101", _NAMED),
    "mnist": _Source("MNIST", _FLAG),
    "oxford-iiit-pet": _Source("OxfordIIITPet", _NAMED | {"train": {"split": "trainval"}}),
    "stl10": _Source("STL10", _NAMED),
    "svhn": _Source("SVHN", _NAMED),
}
BUILTIN = ("digits", *_TORCHVISION)


def list_builtin(name: str) -> Listing:
    """The data set `name` of `BUILTIN`. Raises DataError when it cannot be had."""
    return _digits() if name == "digits" else _torchvision(name)


def _digits() -> Listing:
    """1 797 grey images of 8 x 8, values 0 ... 16 scaled to 0 ... 255; 20 % are test, stratified, seed 0."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    array = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    classes = tuple(str(digit) for digit in range(10))
    parts = {
        split: ListedSplit(ArrayList(array[rows], "digits", rows), labels[rows], classes)
        for split, rows in (("train", np.sort(train)), ("test", np.sort(test)))
    }
    return Listing("digits", parts)


def _torchvision(name: str) -> Listing:
    source = _TORCHVISION[name]
    folder = cache_folder()
    parts = {
        split: _part(_fetch(name, source.kind, folder, arguments), f"{name}-{split}")
        for split, arguments in source.splits.items()
    }
    return Listing(name, parts)


def _fetch(name: str, kind: str, folder: Path, arguments: dict[str, Any]) -> Any:
    """The torchvision data set, from the cache or else downloaded. What it prints goes to stderr."""
    from torchvision import datasets

    make = getattr(datasets, kind)
    with contextlib.redirect_stdout(sys.stderr):
        with contextlib.suppress(RuntimeError):  # how torchvision says that nothing is there yet
            return make(folder, download=False, **arguments)
        try:
            return make(folder, download=True, **arguments)
        except (OSError, RuntimeError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            reason = printable(" ".join(str(error).split()))[:120]
            raise DataError(
                f"{name} could not be downloaded to {printable(str(folder))} ({reason}); connect to the "
                f"internet, or set {CACHE} to a folder that holds it."
            ) from None


def _part(dataset: Any, prefix: str) -> ListedSplit:
    """torchvision keeps arrays in `data` and files in `_image_files` or `_images`."""
    labels = np.asarray(_first(dataset, "targets", "labels", "_labels"), dtype=np.int64)
    classes = getattr(dataset, "classes", None) or range(int(labels.max()) + 1)
    names = tuple(str(name) for name in classes)
    return ListedSplit(_images(dataset, prefix), labels, names)


def _images(dataset: Any, prefix: str) -> FileList | ArrayList:
    if hasattr(dataset, "data"):
        array = _channels_last(np.asarray(dataset.data))
        return ArrayList(array, prefix, np.arange(len(array)))
    files = [str(file) for file in _first(dataset, "_image_files", "_images")]
    root = os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120
    return FileList.pack(root, (os.fsencode(os.path.relpath(file, root)) for file in files))


def _first(dataset: Any, *names: str) -> Any:
    return next(getattr(dataset, name) for name in names if hasattr(dataset, name))


def _channels_last(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.ndim == 3:
        return array[..., None]
    return array.transpose(0, 2, 3, 1) if array.shape[1] == 3 else array
