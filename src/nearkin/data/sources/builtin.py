"""Built-in data sets: scikit-learn's digits, offline, and some of torchvision's, downloaded once."""

from __future__ import annotations

import contextlib
import gzip
import os
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
# What reading a file raises that is not whole, and downloading it.
_DAMAGED = (
    *(OSError, RuntimeError, ValueError, AssertionError, EOFError),
    *(tarfile.TarError, zipfile.BadZipFile),
)
# One bit an image, 1 for test: sklearn's train_test_split(test_size=0.2, stratify=labels, random_state=0).
_DIGITS_TEST = (
    "000004883524104000064100934205001a00080100240028062c12001000940a009019120420f8a0028110a000"
    "080a8820441524494240a00a0000004004d80000818020004805c400104008a0100005404800301000020ec409"
    "000224840083a8013c20a6980a0000000b08400804a0184802024041c1008004404684376a8102160044800040"
    "42a0a4180a5000840b8561c608108008004c80c02004068e00010882008100380803c008190000100e01008410"
    "a0210033282904c044c080680e0102830082008822a6402c24042108a860809081a00c02820242120138a41500"
)


def list_builtin(name: str, *, download: bool = True) -> Listing:
    """The data set `name` of `BUILTIN`. Raises DataError when it cannot be had, or would have to be downloaded and
    `download` is false."""
    return _digits() if name == "digits" else _torchvision(name, download)


def _digits() -> Listing:
    """1 797 grey images of 8 x 8, values 0 ... 16 scaled to 0 ... 255; 20 % are test, stratified, seed 0.

    Reads scikit-learn's file without importing scikit-learn, which takes as long as `import torch`.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("The data set digits is a file of scikit-learn, which is not installed.")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    array = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[:, 64].astype(np.int64)
    test = np.unpackbits(np.frombuffer(bytes.fromhex(_DIGITS_TEST), np.uint8), count=len(labels))
    classes = tuple(str(digit) for digit in range(10))
    parts = {
        split: ListedSplit(ArrayList(array[rows], "digits", rows), labels[rows], classes)
        for split, rows in (("train", np.flatnonzero(test == 0)), ("test", np.flatnonzero(test)))
    }
    return Listing("digits", parts)


def _torchvision(name: str, download: bool) -> Listing:
    source = _TORCHVISION[name]
    folder = cache_folder()
    parts = {
        split: _part(_fetch(name, source.kind, folder, download, arguments), f"{name}-{split}")
        for split, arguments in source.splits.items()
    }
    return Listing(name, parts)


def _fetch(name: str, kind: str, folder: Path, download: bool, arguments: dict[str, Any]) -> Any:
    """The torchvision data set, from the cache or else, with `download`, downloaded. What it prints goes to stderr."""
    from torchvision import datasets

    make = getattr(datasets, kind)
    with contextlib.redirect_stdout(sys.stderr):
        # How torchvision says that nothing is there yet, or that a file is damaged: then it is downloaded again.
        with contextlib.suppress(*_DAMAGED):
            return make(folder, download=False, **arguments)
        if not download:
            raise DataError(f"{name} is not in {printable(str(folder))}.")
        try:
            return make(folder, download=True, **arguments)
        except _DAMAGED as error:
            reason = printable(" ".join(str(error).split()))[:120]
            raise DataError(
                f"{name} could not be downloaded to {printable(str(folder))} ({reason}); connect to the "
                f"internet, delete what a stopped download left there, or set {CACHE} to a folder that holds it."
            ) from None


def _part(dataset: Any, prefix: str) -> ListedSplit:
    """torchvision keeps arrays in `data` and files in `_image_files` or `_images`."""
    labels = np.asarray(_first(dataset, "targets", "labels", "_labels"), dtype=np.int64)
    classes = getattr(dataset, "classes", None) or range(int(labels.max()) + 1)
    names = tuple(str(name) for name in classes)
    if hasattr(dataset, "data"):
        array = np.asarray(dataset.data)
        if array.ndim == 3:
            array = array[..., None]
        elif array.shape[1] == 3:
            array = array.transpose(0, 2, 3, 1)
        return ListedSplit(ArrayList(array, prefix, np.arange(len(array))), labels, names)
    files = [str(file) for file in _first(dataset, "_image_files", "_images")]
    root = os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120
    paths = (os.fsencode(os.path.relpath(file, root)) for file in files)
    return ListedSplit(FileList.pack(root, paths), labels, names)


def _first(dataset: Any, *names: str) -> Any:
    return next(getattr(dataset, name) for name in names if hasattr(dataset, name))
