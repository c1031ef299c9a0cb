"""Which image comes when, and to which rank, whatever the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nearkin.data.keys import keyed_seed
from nearkin.data.samplers import Draw, Draws, shuffled
from nearkin.errors import ConfigError


class SampleKey(NamedTuple):
    """One drawn image: its row in the split, the epoch, and how often the epoch has drawn it before."""

    row: int
    epoch: int
    occurrence: int


def sample_seed(seed: int, epoch: int, index: int, occurrence: int, view: int) -> int:
    """The seed, in [0, 2^63), of one view of one draw of one image. Pure. Source: our choice."""
    return keyed_seed("view", seed, epoch, index, occurrence, view)


class TrainOrder:
    """This rank's part of the global batches `first` (inclusive) to `last` (exclusive), step after step.

    An epoch has n // batch_size steps: its last, incomplete global batch is dropped. Rank r of W gets
    the r-th contiguous block of every global batch.

    n: training images. batch_size: global, a multiple of `world_size`, at most n. draw: epoch -> what it draws
    (`nearkin.data.samplers`); by default every image once, shuffled.
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

    def __len__(self) -> int:
        return max(0, self.last - self.first)

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
