"""What a source holds before classes are numbered and splits are made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.images import ImageSource

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)


class ListedSplit(NamedTuple):
    """One split as its source tells it. labels: `[N]` places in `classes`, this part's own class names."""

    images: ImageSource
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def take(self, rows: NDArray[np.int64]) -> ListedSplit:
        """The part with only `rows`, in that order."""
        return ListedSplit(self.images.take(rows), self.labels[rows], self.classes)

    def present(self) -> list[str]:
        """The classes that have an image here."""
        return [self.classes[place] for place in np.unique(self.labels)]


class Listing(NamedTuple):
    """A data source. parts: by split name; a source without splits has only `train`. notes: for a person."""

    name: str
    parts: dict[str, ListedSplit]
    notes: tuple[str, ...] = ()


def by_bytes(names: Sequence[str] | set[str]) -> list[str]:
    """Sorted by their bytes in the file system: the same order in every locale."""
    return sorted(names, key=os.fsencode)


def numbered(labels: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class names, one per image, as places `[N]` among the sorted distinct names."""
    classes = tuple(by_bytes(set(labels)))
    places = {name: place for place, name in enumerate(classes)}
    return np.fromiter((places[label] for label in labels), np.int64, len(labels)), classes
