"""Lists of images with their classes, before any file is opened. Imports neither torch nor PIL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[int] | NDArray[np.int64]

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?:^|(?<=[_\-. ]))(?:{'|'.join(SPLIT_NAMES)})(?=$|[_\-. \d])")


def split_words(names: Iterable[str]) -> dict[str, str]:
    """Folder name -> split, of those `names` that are names of splits, in any case.

    Either the whole name is one (`Training`), or the names differ from those of other splits in that word only
    (`seg_train` and `seg_test`, but not `bullet_train` and `test_tube`).
    """
    found = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    if found:
        return found
    families: dict[str, dict[str, str]] = {}
    for name in names:
        word = _SPLIT_WORD.search(name.lower())
        if word is not None:
            rest = name.lower()[: word.start()] + "*" + name.lower()[word.end() :]
            families.setdefault(rest, {})[name] = SPLIT_NAMES[word.group()]
    related = [family for family in families.values() if len(set(family.values())) > 1]
    return related[0] if len(related) == 1 else {}


def split_word(name: str) -> str | None:
    """The split whose word is in the name of a folder, such as train of `train_2021`."""
    word = _SPLIT_WORD.search(name.lower())
    return None if word is None else SPLIT_NAMES[word.group()]


class FileList:
    """Paths of image files under a folder, packed: a Python string each would take three times the memory and,
    touched by every loader worker, make each worker copy it.

    root: the folder, as it was given. packed: the paths relative to it as bytes, each ended by NUL. starts: `[N]`,
    where in `packed` each path begins.
    """

    def __init__(self, root: str, packed: bytes, starts: NDArray[np.int64]) -> None:
        self.root, self._packed, self._starts = root, packed, starts

    @classmethod
    def pack(cls, root: str, paths: Iterable[bytes]) -> Self:
        """The list of `paths` relative to `root`."""
        packed = bytearray()
        for path in paths:
            packed += path
            packed += b"\0"
        ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        return cls(root, bytes(packed), starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self._starts)

    def encoded(self, row: int) -> bytes:
        """The path relative to the root, in the bytes of the file system."""
        start = self._starts.item(row)
        return self._packed[start : self._packed.index(b"\0", start)]

    def name(self, row: int) -> str:
        """The path relative to the root."""
        return os.fsdecode(self.encoded(row))

    def path(self, row: int) -> str:
        """The path to open."""
        return os.path.join(self.root, self.name(row))  # noqa: PTH118 - a Path would normalise it

    def take(self, rows: Rows) -> Self:
        """The list with only `rows`, in that order; it shares the packed names."""
        index = np.asarray(rows, dtype=np.int64)
        return type(self)(self.root, self._packed, self._starts[index])

    def __iter__(self) -> Iterator[str]:
        """The paths to open."""
        return map(self.path, range(len(self)))


class ArrayList(NamedTuple):
    """Images of one size in memory. array: uint8 `[N, H, W, C]`, C = 1 or 3. Their names are `prefix/number`."""

    array: NDArray[np.uint8]
    prefix: str
    numbers: NDArray[np.int64]


class ListedSplit(NamedTuple):
    """One split of a source. labels: `[N]`, places in `classes`, the class names of this split."""

    images: FileList | ArrayList
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def present(self) -> list[str]:
        """The classes that have an image here."""
        return [self.classes[place] for place in np.unique(self.labels)]


class Listing(NamedTuple):
    """A data source. data: as it was given. parts: by split name; a source without splits has only `train`.
    notes: what a person should know."""

    name: str
    parts: dict[str, ListedSplit]
    notes: tuple[str, ...] = ()
    data: str = ""


def by_bytes(names: Iterable[str]) -> list[str]:
    """Sorted by their bytes in the file system: the same order in every locale."""
    return sorted(names, key=os.fsencode)


def class_places(labels: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class names, one per image, as places `[N]` among the sorted distinct names."""
    classes = tuple(by_bytes(set(labels)))
    places = {name: place for place, name in enumerate(classes)}
    return np.fromiter((places[label] for label in labels), np.int64, len(labels)), classes
