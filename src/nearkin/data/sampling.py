"""Which images an epoch draws, in which order, and the seed of each: pure functions of (seed, epoch)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.errors import ConfigError


def keyed_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63): BLAKE2b of the purpose and the numbers (each within 64 signed bits).

    Pure, and the same on every machine.
    """
    message = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1


def keyed_rng(purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator (PCG-64) seeded with `keyed_seed(purpose, *numbers)`."""
    return np.random.Generator(np.random.PCG64(keyed_seed(purpose, *numbers)))


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
    """The function epoch -> Draws for these options."""
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
    """Repeated augmentation: about n / repeats images of the shuffled order, each `repeats` times with other crops.

    All copies of an image share a global batch; where `repeats` does not divide it, the last image of a batch has
    fewer. An epoch stays as long as without. Source: Hoffer et al. 2020 (arXiv 1901.09335); the epoch's length as
    in timm; the use of whole batches is not from there.
    """
    batch, position = np.divmod(np.arange(n), batch_size)
    images = -(-batch_size // repeats)  # in each batch
    rows = epoch_order(seed, epoch, n)[batch * images + position // repeats]
    return _scattered(Draws(rows, position % repeats), seed, epoch, batch_size)


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

    A class of n_c images gives n_c // per_class groups; the n_c mod per_class images left over change from epoch to
    epoch. A class with fewer images than a group is one short group. Left-over images are drawn, as short groups too,
    only where full groups and small classes do not fill the epoch. At most one short group is cut between two batches.
    Where short groups do not fill their last `per_class` places, one full group is split into single images. No image
    is drawn twice; a class may have several groups in a batch.
    After Hermans et al. 2017.
    """
    rng = keyed_rng("groups", seed, epoch)
    need = len(labels) // batch_size * (batch_size // per_class)
    groups, tail, small = _grouped(labels, seed, epoch, per_class)
    wanted = -(-small // per_class)
    if wanted > len(tail) // per_class and len(groups):
        split = rng.integers(len(groups))
        tail, groups = np.concatenate([tail, groups[split]]), np.delete(groups, split, axis=0)
    count = min(max(wanted, need - len(groups)), len(tail) // per_class)
    short = _classes_shuffled(tail[: count * per_class], labels, rng)
    places = np.concatenate([groups, short.reshape(-1, per_class)])
    order = rng.permutation(len(places))[:need]
    is_short = order >= len(groups)
    order[is_short] = len(groups) + np.arange(is_short.sum())
    rows = places[order].reshape(-1)
    return _scattered(Draws(rows, np.zeros_like(rows)), seed, epoch, batch_size)


def _grouped(labels: Rows, seed: int, epoch: int, size: int) -> tuple[Rows, Rows, int]:
    """Full groups `[g, size]`; the remaining images, class by class and small classes first; the number of images of
    small classes."""
    members = _by_class(labels, keyed_rng("turns", seed))  # the same order in every epoch
    classes, counts = labels[members], np.bincount(labels)
    starts, of, left = (x[classes] for x in (np.cumsum(counts) - counts, counts, counts % size))
    # Each class is rotated by its remainder in every epoch, so that each image is left over equally often.
    over = (np.arange(len(labels)) - starts - epoch * left) % of >= of - left
    kept = members[~over]
    groups = kept[_by_class(labels[kept], keyed_rng("within", seed, epoch))]
    few = over & (of < size)  # a class with fewer images than a group
    rng = keyed_rng("classes", seed, epoch)
    parts = [_classes_shuffled(members[of_tail], labels, rng) for of_tail in (few, over & ~few)]
    return groups.reshape(-1, size), np.concatenate(parts), len(parts[0])


def _by_class(labels: Rows, rng: np.random.Generator) -> Rows:
    """The positions of `labels` sorted by class, shuffled within each."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _classes_shuffled(rows: Rows, labels: Rows, rng: np.random.Generator) -> Rows:
    """The same rows class by class, the classes in random order, each class in the order that it had."""
    ranks = rng.permutation(int(labels.max()) + 1)
    return rows[np.argsort(ranks[labels[rows]], kind="stable")]


def _scattered(draws: Draws, seed: int, epoch: int, batch_size: int) -> Draws:
    """The same batches with their positions shuffled."""
    count = len(draws.rows)
    noise = keyed_rng("positions", seed, epoch).random(count)
    order = np.lexsort((noise, np.arange(count) // batch_size))
    return Draws(draws.rows[order], draws.occurrences[order])


def _occurrences(rows: Rows) -> Rows:
    """For each position, how often its row occurred before."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    earlier = np.empty(len(rows), dtype=np.int64)
    earlier[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return earlier


class SampleKey(NamedTuple):
    """One drawn image: its row in the split, the epoch, and how often the epoch has drawn it before."""

    row: int
    epoch: int
    occurrence: int


def sample_seed(seed: int, epoch: int, index: int, occurrence: int, view: int) -> int:
    """The seed, in [0, 2^63), of one view of one draw of one image. Pure."""
    return keyed_seed("view", seed, epoch, index, occurrence, view)


class TrainOrder:
    """This rank's part of the global batches `first` (inclusive) to `last` (exclusive), step after step.

    An epoch has n // batch_size steps: its last, incomplete global batch is dropped. Rank r of W gets
    the r-th contiguous block of every global batch.

    n: training images. batch_size: global, a multiple of `world_size`, at most n. draw: epoch -> what it draws
    (`nearkin.data.sampling`); by default every image once, shuffled.
    Raises ConfigError when these do not fit.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        batch_size: int,
        first: int,
        last: int,
        rank: int = 0,
        world_size: int = 1,
        draw: Draw | None = None,
    ) -> None:
        if not 0 < batch_size <= n:
            raise ConfigError(
                f"--batch-size {batch_size} is not possible with {n} training images; use 1 to {n}."
            )
        if batch_size % world_size:
            raise ConfigError(
                f"--batch-size {batch_size} cannot be divided among {world_size} processes; "
                f"use a multiple of {world_size}."
            )
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self.first, self.last = first, last
        self.rank, self.world_size = rank, world_size
        self.draw: Draw = draw or (lambda epoch: shuffled(n, seed, epoch))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps_per_epoch = self.n // self.batch_size
        block = self.batch_size // self.world_size
        drawn: tuple[int, Draws] | None = None
        for step in range(self.first, self.last):
            epoch, position = divmod(step, steps_per_epoch)
            if drawn is None or drawn[0] != epoch:
                drawn = epoch, self.draw(epoch)
            start = position * self.batch_size + self.rank * block
            rows, occurrences = (column[start : start + block].tolist() for column in drawn[1])
            yield [
                SampleKey(row, epoch, occurrence)
                for row, occurrence in zip(rows, occurrences, strict=True)
            ]
