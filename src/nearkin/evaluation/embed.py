"""Embeddings of many images with their paths, and with labels where the images are data. Torch only to compute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nearkin.data.sources.builtin import BUILTIN
from nearkin.data.sources.folders import find_images
from nearkin.data.sources.listing import ArrayList, Listing
from nearkin.data.sources.resolve import resolve
from nearkin.data.sources.tables import TABLE_SUFFIXES
from nearkin.errors import DataError, counted, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from nearkin.evaluation.classifier import Classifier, Read

WHAT = "images embedded"


class Labelled(NamedTuple):
    """Images to embed. images: paths, or arrays uint8 `[H, W, C]`. labels, splits: of each image, or None."""

    names: Sequence[str]
    images: Sequence[str | NDArray[np.uint8]]
    labels: Sequence[str] | None = None
    splits: Sequence[str] | None = None


class Embedded(NamedTuple):
    """The images that could be read. embeddings: `[N, e]` float32, of any length. bad: path and reason of others."""

    paths: list[str]
    embeddings: NDArray[np.float32]
    labels: list[str] | None
    splits: list[str] | None
    bad: list[tuple[str, str]]


def as_data(word: str) -> tuple[Listing | None, list[str]]:
    """The listing of a word that is DATA: a built-in name, a table, or a folder whose images are all in class folders;
    and notes.

    Raises DataError when a table cannot be read.
    """
    if word in BUILTIN or word.lower().endswith(TABLE_SUFFIXES):
        listing = resolve(word)
        return listing, list(listing.notes)
    if not os.path.isdir(word):  # noqa: PTH112 - a Path would normalise it
        return None, []
    try:
        listing = resolve(word)
    except DataError as error:
        names = [os.path.relpath(file, word) for file in find_images(word).files]
        if not any(os.path.dirname(name) for name in names):  # noqa: PTH120
            return None, []  # images without classes
        return None, [f"{error} So no labels are written."]
    beside = len(find_images(word).files) - sum(len(p.labels) for p in listing.parts.values())
    if beside:
        text = f"{counted(beside, 'image')} outside the class folders: no labels are written"
        return None, [f"{printable(word)}: {text}"]
    return listing, list(listing.notes)


def labelled(listing: Listing) -> Labelled:
    """The images of all splits, in the order train, val, test."""
    names: list[str] = []
    images: list[str | NDArray[np.uint8]] = []
    labels: list[str] = []
    splits: list[str] = []
    for split, part in listing.parts.items():
        if isinstance(part.images, ArrayList):
            names += [f"{part.images.prefix}/{number}" for number in part.images.numbers]
            images += list(part.images.array)
        else:
            names += part.images
            images += part.images
        labels += [part.classes[label] for label in part.labels]
        splits += [split] * len(part.labels)
    return Labelled(names, images, labels, splits if len(listing.parts) > 1 else None)


def _noted(
    batches: Iterator[tuple[list[Read], NDArray[np.float32]]], rows: list[NDArray[np.float32]]
) -> Iterator[list[Read]]:
    """The images of each batch; its embeddings are added to `rows`."""
    for read, embeddings in batches:
        if len(embeddings):
            rows.append(embeddings)
        yield read


def embed(model: Classifier, given: Labelled, *, quiet: bool = True) -> Embedded:
    """The embeddings of all images that can be read. quiet: without a bar on stderr.

    Raises DataError when none can be read.
    """
    import numpy as np

    from nearkin.data.look import shown

    kept: list[int] = []
    bad: list[tuple[str, str]] = []
    rows: list[NDArray[np.float32]] = []
    for read in shown(_noted(model.embeddings(given.images), rows), len(given.names), WHAT, quiet):
        for one in read:
            place = len(kept) + len(bad)
            if one.error is None:
                kept.append(place)
            else:
                bad.append((given.names[place], one.error))
    if not rows:
        path, reason = bad[0]
        count = counted(len(bad), "image")
        raise DataError(f"None of {count} can be read, such as {printable(path)} ({reason}).")

    def of_kept(values: Sequence[str] | None) -> list[str] | None:
        return None if values is None else [values[row] for row in kept]

    paths = [given.names[row] for row in kept]
    columns = of_kept(given.labels), of_kept(given.splits)
    return Embedded(paths, np.concatenate(rows), *columns, bad)
