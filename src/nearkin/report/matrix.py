"""The confusion matrix, ordered so that classes which are confused stand together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.errors import counted

MOST = 24  # classes that a matrix shows; of more, those that are confused most often

Counts = NDArray[np.int64]


class Matrix(NamedTuple):
    """names: of the columns. rows: with `name` and `cells`. total: classes that there are."""

    names: list[str]
    rows: list[dict[str, Any]]
    total: int


Confusion = Sequence[tuple[str, str, int]]  # label, predicted, images


def counts(confusion: Confusion, classes: Sequence[str]) -> Counts:
    """`[C, C]` images by label and predicted class, both among `classes`."""
    place = {name: number for number, name in enumerate(classes)}
    found = np.zeros((len(classes), len(classes)), np.int64)
    for true, predicted, images in confusion:
        if true in place and predicted in place:
            found[place[true], place[predicted]] = images
    return found


def most_confused(confusion: Confusion, classes: Sequence[str]) -> list[str]:
    """The classes of the most frequent confusions, at most MOST, in their order; all where there are no more. Where
    fewer are confused, the first others as well."""
    place = {name: number for number, name in enumerate(classes)}
    wrong = [(-n, place[a], place[b]) for a, b, n in confusion if a != b and n > 0]
    kept: dict[int, None] = {}
    for _, *pair in sorted(wrong):
        new = [number for number in pair if number not in kept]
        if len(kept) + len(new) <= MOST:
            kept |= dict.fromkeys(new)
    others = (number for number in range(len(classes)) if number not in kept)
    return [classes[number] for number in sorted([*kept, *islice(others, MOST - len(kept))])]


def ordered(found: Counts) -> list[int]:
    """An order of the classes in which those that are confused stand together: that of the leaves of average linkage
    of 1 - s, s_ab = (n_ab / n_a + n_ba / n_b) / 2, with neighbouring leaves as similar as possible (Bar-Joseph et al.
    2001). The given order where nothing is confused."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    rates = found / np.maximum(found.sum(1, keepdims=True), 1)
    similar = (rates + rates.T) / 2
    np.fill_diagonal(similar, 0)
    if len(found) < 3 or not similar.any():
        return list(range(len(found)))
    distances = 1 - similar
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    order: list[int] = leaves_list(tree).tolist()
    return order


def matrix(confusion: Confusion, classes: Sequence[str]) -> Matrix:
    """The cells of the matrix with their words and colours."""
    kept = most_confused(confusion, classes)
    kept = [kept[number] for number in ordered(counts(confusion, kept))]
    found, place = counts(confusion, kept), {name: n for n, name in enumerate(classes)}
    totals = dict.fromkeys(classes, 0)
    for true, _, images in confusion:
        totals[true] += images
    rows = []
    for a, name in enumerate(kept):
        total, cells = max(1, totals[name]), []
        for b, other in enumerate(kept):
            images = int(found[a, b])
            done = "recognised" if a == b else f"taken for {other}"
            cells.append(
                {
                    "count": images,
                    "kind": "hit" if a == b else "miss",
                    "share": f"{images / total:.3f}",
                    "pair": f"{place[name]},{place[other]}",
                    "words": f"{name} {done}: {counted(images, 'image')}",
                }
            )
        rows.append({"name": name, "cells": cells})
    return Matrix(kept, rows, len(classes))
