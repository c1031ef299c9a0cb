"""All images of a data set in one numbering, whatever their split."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.dataset import Dataset, Split, to_split
from nearkin.data.images import Files
from nearkin.data.sources.listing import SPLITS, by_bytes
from nearkin.doctor.findings import Concerned

Rows = NDArray[np.int64]


class Inventory(NamedTuple):
    """N images: those of train, then val, then test.

    splits: with labels as places in `classes`, the classes of all splits together. labels, split: `[N]`, places in
    `classes` and in `names`, the names of the splits.
    """

    name: str
    splits: dict[str, Split]
    classes: tuple[str, ...]
    labels: Rows
    split: Rows

    @classmethod
    def of(cls, chosen: Dataset) -> Inventory:
        """chosen: from `nearkin.data.dataset.choose`."""
        present = {name for part in chosen.splits.values() for name in part.present()}
        classes = tuple(by_bytes(present))
        splits = {
            name: to_split(chosen.splits[name], classes) for name in SPLITS if name in chosen.splits
        }
        counts = [len(part.labels) for part in splits.values()]
        labels = np.concatenate([part.labels for part in splits.values()])
        return cls(chosen.name, splits, classes, labels, np.repeat(np.arange(len(splits)), counts))

    def relabelled(self, labels: Mapping[int, str]) -> Inventory:
        """With other classes, which may be new, for some images."""
        classes = (*self.classes, *sorted(set(labels.values()) - set(self.classes)))
        given = self.labels.copy()
        for row, label in labels.items():
            given[row] = classes.index(label)
        return self._replace(classes=classes, labels=given)

    def without(self, out: Collection[int]) -> Inventory:
        """Only the images that are not in `out`, numbered anew, and the classes that they have. Train stays a split,
        even where none of its images is left; another one goes."""
        kept = np.setdiff1d(np.arange(len(self.labels)), np.fromiter(out, np.int64, len(out)))
        classes = tuple(by_bytes(self.classes[place] for place in np.unique(self.labels[kept])))
        splits = {}
        for number, (name, part) in enumerate(self.splits.items()):
            rows = kept[self.split[kept] == number]
            if len(rows) or name == "train":
                own = part.take(rows - self.starts[number])
                given = own._replace(labels=self.labels[rows], classes=self.classes)
                splits[name] = to_split(given, classes)
        labels = np.concatenate([part.labels for part in splits.values()])
        counts = [len(part.labels) for part in splits.values()]
        return Inventory(
            self.name, splits, classes, labels, np.repeat(np.arange(len(splits)), counts)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The splits there are."""
        return tuple(self.splits)

    @property
    def starts(self) -> list[int]:
        """The number of the first image of each split."""
        starts: list[int] = np.searchsorted(self.split, np.arange(len(self.splits))).tolist()
        return starts

    @property
    def from_files(self) -> bool:
        """Whether the images are files; a data set has either files or arrays."""
        return all(isinstance(part.images, Files) for part in self.splits.values())

    def place(self, row: int) -> tuple[Split, int]:
        """The split of an image, and its row there."""
        number = int(self.split[row])
        return self.splits[self.names[number]], row - self.starts[number]

    def path(self, row: int) -> str:
        """The path to open, or the name of an image that is no file."""
        part, place = self.place(row)
        return (
            part.images.path(place) if isinstance(part.images, Files) else part.images.name(place)
        )

    def key(self, row: int) -> bytes:
        """The absolute path of an image file."""
        part, place = self.place(row)
        assert isinstance(part.images, Files)
        return part.images.key(place)

    def label(self, row: int) -> str:
        """The name of its class."""
        return self.classes[int(self.labels[row])]

    def split_name(self, row: int) -> str:
        """The name of its split."""
        return self.names[int(self.split[row])]

    def concerned(
        self, rows: Iterable[int], details: Mapping[int, str] | str = ""
    ) -> tuple[Concerned, ...]:
        """The images as files of a finding. details: by row, or the same for all."""
        return tuple(
            Concerned(
                self.path(row),
                self.label(row),
                self.split_name(row),
                details if isinstance(details, str) else details.get(row, ""),
            )
            for row in map(int, rows)
        )
