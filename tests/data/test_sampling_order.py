"""The order of data: a pure function of (seed, epoch), the same on any number of ranks."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from nearkin.data.sampling import Draws, SampleKey, TrainOrder, epoch_order, sample_seed
from nearkin.errors import ConfigError

N, B = 45, 8  # five steps an epoch, five images dropped


def batches(first=0, last=20, **options) -> list[list[SampleKey]]:
    order = TrainOrder(N, **({"seed": 3, "batch_size": B} | options), first=first, last=last)
    made = list(order)
    assert len(made) == max(0, last - first)
    return made


def test_an_epoch_is_the_permutation_less_its_last_incomplete_batch():
    made = batches(last=15)
    for epoch in range(3):
        keys = list(itertools.chain(*made[5 * epoch : 5 * epoch + 5]))
        assert [key.row for key in keys] == epoch_order(3, epoch, N)[:40].tolist()
        assert {key.epoch for key in keys} == {epoch}
        assert {key.occurrence for key in keys} == {0}


def test_permutations():
    assert sorted(epoch_order(0, 0, 100)) == list(range(100))
    assert epoch_order(5, 7, 50).tolist() == epoch_order(5, 7, 50).tolist()
    different = {tuple(epoch_order(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(different) == 100
    first = np.bincount([epoch_order(seed, 0, 5)[0] for seed in range(2000)], minlength=5)
    assert abs(first - 400).max() < 100  # 400 expected, deviation 18


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7, 19, 20])
def test_starting_later_gives_the_rest(start):
    assert batches(first=start) == batches()[start:]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_hold_contiguous_blocks_of_the_global_batch(world_size):
    ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [list(itertools.chain(*blocks)) for blocks in zip(*ranks, strict=True)]
    assert joined == batches()


def test_numbers_that_do_not_fit():
    with pytest.raises(ConfigError, match="--batch-size 46 is not possible with 45"):
        batches(batch_size=46)
    with pytest.raises(ConfigError, match="cannot be divided among 3 processes"):
        batches(world_size=3)


def test_another_way_to_draw_is_one_function():
    def twice(epoch):
        rows = np.repeat(np.arange(N // 2), 2)
        return Draws(rows, np.tile([0, 1], len(rows) // 2))

    made = list(TrainOrder(N, seed=0, batch_size=4, first=0, last=1, draw=twice))
    assert made == [
        [SampleKey(0, 0, 0), SampleKey(0, 0, 1), SampleKey(1, 0, 0), SampleKey(1, 0, 1)]
    ]


def test_seeds_of_samples_are_distinct_and_pure():
    keys = list(itertools.product((0, 1, 2**62), range(3), range(20), range(2), range(3)))
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [sample_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) == len(keys)  # torch's CPU generator reads 32 bits


def test_seeds_are_well_mixed():
    """Neighbouring keys differ in about half of the bits, and every bit is set about half of the time."""
    bits = np.array([[sample_seed(0, 0, i, 0, 0) >> b & 1 for b in range(63)] for i in range(2000)])
    assert abs(bits.mean(0) - 0.5).max() < 0.06  # deviation 0.011
    assert abs((bits[1:] != bits[:-1]).mean() - 0.5) < 0.01


def test_seeds_are_the_same_on_every_machine():
    message = b"view\0" + b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 4, 5))
    digest = hashlib.blake2b(message, digest_size=8).digest()
    assert sample_seed(1, 2, 3, 4, 5) == int.from_bytes(digest, "little") >> 1
