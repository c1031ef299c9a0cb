"""Which image comes when: a pure function of (seed, epoch), whatever the workers and the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.keys import keyed_rng, keyed_seed
from nearkin.errors import ConfigError


class SampleKey(NamedTuple):
    """One drawn image: its row in the split, the epoch, and how often the epoch has drawn it before."""

    row: int
    epoch: int
    occurrence: int


class Draws(NamedTuple):
    """All draws of an epoch, in order. rows, occurrences: `[n]`."""

    rows: NDArray[np.int64]
    occurrences: NDArray[np.int64]


def sample_seed(seed: int, epoch: int, index: int, occurrence: int, view: int) -> int:
    """The seed, in [0, 2^63), of one view of one draw of one image. Pure. Source: our choice."""
    return keyed_seed("view", seed, epoch, index, occurrence, view)


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0 ... n - 1, a pure function of its arguments."""
    return keyed_rng("order", seed, epoch).permutation(n)


class TrainOrder:
    """This rank's part of the global batches `first` (inclusive) to `last` (exclusive), step after step.

    An epoch has n // batch_size steps: its last, incomplete global batch is dropped. Rank r of W gets
    the r-th contiguous block of every global batch. Another way to draw overrides `draws`.

    n: training images. batch_size: global, a multiple of `world_size`, at most n.
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

    def draws(self, epoch: int) -> Draws:
        """Every image once, shuffled."""
        return Draws(epoch_order(self.seed, epoch, self.n), np.zeros(self.n, dtype=np.int64))

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps_per_epoch = self.n // self.batch_size
        block = self.batch_size // self.world_size
        drawn: tuple[int, Draws] | None = None
        for step in range(self.first, self.last):
            epoch, position = divmod(step, steps_per_epoch)
            if drawn is None or drawn[0] != epoch:
                drawn = epoch, self.draws(epoch)
            start = position * self.batch_size + self.rank * block
            rows, occurrences = (column[start : start + block].tolist() for column in drawn[1])
            yield [
                SampleKey(row, epoch, occurrence)
                for row, occurrence in zip(rows, occurrences, strict=True)
            ]
