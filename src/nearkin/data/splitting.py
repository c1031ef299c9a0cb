"""Choosing rows by class: pure functions of labels and seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearkin.data.keys import keyed_rng

Labels = NDArray[np.int64]


def stratified(labels: Labels, fraction: float, seed: int) -> NDArray[np.int64]:
    """The sorted rows to hold out: floor(fraction N) of N, but at least 1, shared among the classes.

    labels: `[N]`. Class c of n_c images gives floor(fraction n_c); what is left goes to the largest
    remainders, ties in a random order. At least one image of every class stays, so a class with one image
    gives none, and the result is empty when every class has only one. Source: our choice.
    """
    rng = keyed_rng("held out", seed)
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = _quota(counts, fraction, rng.permutation(len(counts)))
    return _first_of_each(place, quota, rng.permutation(len(labels)))


def limited(labels: Labels, most: int, seed: int) -> NDArray[np.int64]:
    """The sorted rows to keep so that no class has more than `most`, chosen at random. labels: `[N]`."""
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rng = keyed_rng("images per class", seed)
    return _first_of_each(place, np.minimum(counts, most), rng.permutation(len(labels)))


def _quota(counts: Labels, fraction: float, order: Labels) -> NDArray[np.int64]:
    """How many images each class gives. order: of the classes, where remainders tie."""
    room = counts - 1
    wanted = fraction * counts
    quota: NDArray[np.int64] = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), room)
    total = min(max(1, int(fraction * counts.sum() + 1e-9)), int(room.sum()))
    while (left := total - int(quota.sum())) > 0:
        by_remainder = order[np.argsort((quota - wanted)[order], kind="stable")]
        quota[by_remainder[(quota < room)[by_remainder]][:left]] += 1
    return quota


def _first_of_each(place: Labels, quota: Labels, shuffled: Labels) -> NDArray[np.int64]:
    """The sorted first `quota[c]` rows of each class c, in the order of `shuffled`."""
    grouped = shuffled[np.argsort(place[shuffled], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(quota)))])
    chosen = [grouped[start : start + n] for start, n in zip(starts, quota, strict=False)]
    return np.sort(np.concatenate(chosen)) if chosen else grouped
