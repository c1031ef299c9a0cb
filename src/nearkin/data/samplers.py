"""How an epoch draws its images: pure functions of (seed, epoch), so the same on any number of ranks.

Each returns at least n // batch_size * batch_size draws. Except for `shuffled`, positions are shuffled inside every
global batch, so that neither mixing's blocks nor a rank's block hold one class or one image only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.keys import keyed_rng

Rows = NDArray[np.int64]
Sampler = Literal["shuffle", "balanced", "weighted"]


class Draws(NamedTuple):
    """All draws of an epoch, in order. rows, occurrences: `[m]`; an occurrence counts earlier draws of that row."""

    rows: Rows
    occurrences: Rows


Draw = Callable[[int], Draws]


def drawing(
    sampler: Sampler, labels: Rows, *, seed: int, batch_size: int, per_class: int, repeats: int
) -> Draw:
    """The function epoch -> Draws that these options mean."""
    if sampler == "balanced":
        return lambda epoch: balanced(labels, seed, epoch, batch_size, per_class)
    if sampler == "weighted":
        return lambda epoch: weighted(labels, seed, epoch)
    if repeats > 1:
        return lambda epoch: repeated(len(labels), seed, epoch, batch_size, repeats)
    return lambda epoch: shuffled(len(labels), seed, epoch)


def shuffled(n: int, seed: int, epoch: int) -> Draws:
    """Every image once, in an order of its own each epoch."""
    return Draws(epoch_order(seed, epoch, n), np.zeros(n, dtype=np.int64))


def epoch_order(seed: int, epoch: int, n: int) -> Rows:
    """A permutation of 0 ... n - 1, a pure function of its arguments."""
    return keyed_rng("order", seed, epoch).permutation(n)


def repeated(n: int, seed: int, epoch: int, batch_size: int, repeats: int) -> Draws:
    """Repeated augmentation: n / repeats images of the shuffled order, each `repeats` times with other crops.

    The copies share a global batch, except where `repeats` does not divide it. An epoch stays as long as without.
    Source: Hoffer et al. 2020 (arXiv 1901.09335); the epoch's length as in timm.
    """
    images = epoch_order(seed, epoch, n)[: -(-n // repeats)]
    draws = Draws(np.repeat(images, repeats)[:n], np.tile(np.arange(repeats), len(images))[:n])
    return _scattered(draws, seed, epoch, batch_size)


def weighted(labels: Rows, seed: int, epoch: int) -> Draws:
    """n draws with replacement, every class that has images equally likely, and so is each image of a class."""
    rng = keyed_rng("weighted", seed, epoch)
    members = np.argsort(labels, kind="stable")
    present, starts, counts = np.unique(labels[members], return_index=True, return_counts=True)
    chosen = rng.integers(len(present), size=len(labels))
    rows = members[starts[chosen] + rng.integers(counts[chosen])]
    return Draws(rows, _occurrences(rows))


def balanced(labels: Rows, seed: int, epoch: int, batch_size: int, per_class: int) -> Draws:
    """Groups of `per_class` images of one class; batch_size is a multiple of it, so a group lies in one batch.

    A class of n_c images gives n_c // per_class groups; the n_c mod per_class images that are left over are others
    each epoch, in turn. A class with fewer images than a group is one short group; short groups are put together to
    fill places of the same size. Left-over images are drawn only where groups do not fill the epoch. No image is
    drawn twice. A class may have several groups in a batch. Source: our choice, after Hermans et al. 2017.
    """
    groups, small, spare = _grouped(labels, seed, epoch, per_class)
    rng = keyed_rng("groups", seed, epoch)
    need = len(labels) // batch_size * (batch_size // per_class)
    spare = rng.permutation(spare)
    gap = -len(small) % per_class  # the last place of short groups is filled up
    filled = np.concatenate([small, spare[:gap]])
    short = filled[: len(filled) // per_class * per_class].reshape(-1, per_class)
    places = rng.permutation(np.concatenate([groups, short]))[:need]
    missing = need - len(places)
    if missing:
        rest = np.concatenate([filled[short.size :], spare[gap:]])[: missing * per_class]
        places = rng.permutation(np.concatenate([places, rest.reshape(-1, per_class)]))
    rows = places.reshape(-1)
    return _scattered(Draws(rows, np.zeros_like(rows)), seed, epoch, batch_size)


def _grouped(labels: Rows, seed: int, epoch: int, size: int) -> tuple[Rows, Rows, Rows]:
    """Full groups `[g, size]`, the images of small classes in a row, and the images left over."""
    fixed = keyed_rng("turns", seed).permutation(len(labels))
    members = fixed[np.argsort(labels[fixed], kind="stable")]  # by class, in an order that stays
    classes = labels[members]
    _, starts, counts = np.unique(classes, return_index=True, return_counts=True)
    counts_of, starts_of = np.repeat(counts, counts), np.repeat(starts, counts)
    left = counts_of % size
    # Each class turns by the number left over last time: in turn everyone stands at its end.
    turned = (np.arange(len(labels)) - starts_of - epoch * left) % counts_of
    over = (turned >= counts_of - left) & (counts_of >= size)
    few = counts_of < size
    shuffle = keyed_rng("within", seed, epoch).random(len(labels))
    kept = members[~over & ~few]
    order = np.lexsort((shuffle[~over & ~few], classes[~over & ~few]))
    ranks = keyed_rng("classes", seed, epoch).permutation(int(labels.max()) + 1)
    small = members[few][np.argsort(ranks[classes[few]], kind="stable")]
    return kept[order].reshape(-1, size), small, members[over]


def _scattered(draws: Draws, seed: int, epoch: int, batch_size: int) -> Draws:
    """The same batches with their positions shuffled."""
    count = len(draws.rows)
    noise = keyed_rng("positions", seed, epoch).random(count)
    order = np.lexsort((noise, np.arange(count) // batch_size))
    return Draws(draws.rows[order], draws.occurrences[order])


def _occurrences(rows: Rows) -> Rows:
    """How often each row came before."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    earlier = np.empty(len(rows), dtype=np.int64)
    earlier[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return earlier
