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


def counts(confusion: Sequence[tuple[str, str, int]], classes: Sequence[str]) -> Counts:
    """`[C, C]` images by label and predicted class. confusion: label, predicted, images."""
    place = {name: number for number, name in enumerate(classes)}
    found = np.zeros((len(classes), len(classes)), np.int64)
    for true, predicted, images in confusion:
        found[place[true], place[predicted]] = images
    return found


def most_confused(found: Counts, most: int = MOST) -> list[int]:
    """The classes of the most frequent confusions, at most `most`, rising; all where there are no more. Where fewer are
    confused, the first others as well."""
    if len(found) <= most:
        return list(range(len(found)))
    wrong = found - np.diag(np.diag(found))
    order = np.argsort(-wrong.ravel(), kind="stable")
    kept: dict[int, None] = {}
    for place in order[: np.count_nonzero(wrong)].tolist():
        pair = [number for number in divmod(place, len(found)) if number not in kept]
        if len(kept) + len(pair) <= most:
            kept |= dict.fromkeys(pair)
    others = (number for number in range(len(found)) if number not in kept)
    return sorted([*kept, *islice(others, most - len(kept))])


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


def matrix(confusion: Sequence[tuple[str, str, int]], classes: Sequence[str]) -> Matrix:
    """The cells of the matrix with their words and colours."""
    found = counts(confusion, classes)
    kept = np.array(most_confused(found), dtype=np.int64)
    kept = kept[ordered(found[np.ix_(kept, kept)])] if len(kept) else kept
    rows = []
    for a in kept.tolist():
        total = max(1, int(found[a].sum()))
        cells = []
        for b in kept.tolist():
            images = int(found[a, b])
            done = "recognised" if a == b else f"taken for {classes[b]}"
            cells.append(
                {
                    "count": images,
                    "kind": "hit" if a == b else "miss",
                    "share": f"{images / total:.3f}",
                    "pair": f"{a},{b}",
                    "words": f"{classes[a]} {done}: {counted(images, 'image')}",
                }
            )
        rows.append({"name": classes[a], "cells": cells})
    return Matrix([classes[b] for b in kept.tolist()], rows, len(classes))
