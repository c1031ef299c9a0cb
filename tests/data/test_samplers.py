"""What an epoch draws: counted, not trusted."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from nearkin.data import TrainOrder, drawing
from nearkin.data.samplers import balanced, repeated, weighted

SIZES = {
    "equal": [20] * 5,
    "unequal": [37, 3, 1, 18, 4, 9, 2],
    "one giant": [200, 1, 1, 5],
    "all tiny": [1, 2, 3, 1, 2, 1, 1, 3],
    "exact": [8, 8, 8],
}


def labels_of(sizes, seed=0):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(labels)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("per_class", [1, 2, 4])
def test_balanced_draws_no_image_twice_and_fills_the_epoch(name, per_class):
    labels = labels_of(SIZES[name])
    batch = 4 * max(1, per_class // 2)
    for epoch in range(6):
        rows = balanced(labels, 3, epoch, batch, per_class).rows
        assert len(rows) == len(labels) // batch * batch
        assert len(set(rows.tolist())) == len(rows)


def groups(labels, rows, batch, size):
    """How many images of each class every batch holds."""
    return [Counter(labels[rows[i : i + batch]].tolist()) for i in range(0, len(rows), batch)]


def test_groups_lie_whole_in_a_batch():
    labels = labels_of([40, 40, 40, 40])
    for epoch in range(3):
        rows = balanced(labels, 0, epoch, 16, 4).rows
        for counts in groups(labels, rows, 16, 4):
            assert all(count % 4 == 0 for count in counts.values())


def test_a_class_may_have_several_groups_in_a_batch_and_few_images_are_one_short_group():
    labels = labels_of([60, 3, 1])
    rows = balanced(labels, 0, 0, 16, 4).rows
    assert max(counts[0] for counts in groups(labels, rows, 16, 4)) > 4
    # the three images of class 1 are drawn together, where no place ends between them
    epochs = [balanced(labels, 0, epoch, 16, 4).rows for epoch in range(40)]
    held = [counts[1] for rows in epochs for counts in groups(labels, rows, 16, 4)]
    assert max(held) == 3


def test_left_over_images_take_turns():
    """Five images in groups of four: each epoch leaves another one out, in five epochs every image once."""
    labels = labels_of([5, 5, 5, 5])
    left = [set(range(20)) - set(balanced(labels, 0, e, 16, 4).rows.tolist()) for e in range(5)]
    assert all(len(out) == 4 for out in left)
    assert set(itertools.chain(*left)) == set(range(20))


def test_partners_change_from_epoch_to_epoch():
    labels = labels_of([40, 40])
    together = set()
    for epoch in range(20):
        rows = balanced(labels, 0, epoch, 8, 4).rows
        for i in range(0, len(rows), 8):
            mine = [r for r in rows[i : i + 8] if labels[r] == 0]
            together |= set(itertools.combinations(sorted(mine), 2))
    assert len(together) > 300  # of 780 pairs; the same groups each epoch would give at most 140


def test_positions_are_shuffled_inside_a_batch():
    labels = labels_of([400, 400])
    rows = balanced(labels, 0, 0, 80, 8).rows
    runs = (labels[rows][1:] == labels[rows][:-1]).mean()
    assert 0.4 < runs < 0.6  # whole groups in a row would give 0.94


def test_weighted_draws_classes_equally_often():
    labels = labels_of([900, 90, 10])
    drawn = np.concatenate([labels[weighted(labels, 0, epoch).rows] for epoch in range(30)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.01)
    rows = np.concatenate([weighted(labels, 0, epoch).rows for epoch in range(30)])
    of_last = np.bincount(rows, minlength=1000)[labels == 2]
    assert of_last.min() > 0.8 * of_last.mean()  # every image of a class is as likely


def test_occurrences_tell_the_draws_of_an_image_apart():
    labels = labels_of([50, 2])
    draws = weighted(labels, 1, 0)
    seen = Counter()
    for row, occurrence in zip(draws.rows.tolist(), draws.occurrences.tolist(), strict=True):
        assert occurrence == seen[row]
        seen[row] += 1
    assert max(seen.values()) > 5


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats_share_a_batch_and_differ_in_occurrence(repeats):
    batch = 4 * repeats
    draws = repeated(100, 0, 0, batch, repeats)
    assert len(draws.rows) == 100
    assert len(set(draws.rows.tolist())) == -(-100 // repeats)
    for i in range(0, 100 // batch * batch, batch):
        keys = set(
            zip(
                draws.rows[i : i + batch].tolist(),
                draws.occurrences[i : i + batch].tolist(),
                strict=True,
            )
        )
        assert keys == {(row, n) for row, _ in keys for n in range(repeats)}
    assert set(draws.rows.tolist()) != set(repeated(100, 0, 1, batch, repeats).rows.tolist())


@pytest.mark.parametrize(
    "options",
    [{"sampler": "balanced"}, {"sampler": "weighted"}, {"sampler": "shuffle", "repeats": 3}],
)
def test_the_same_on_any_number_of_ranks_and_from_any_step(options):
    labels = labels_of([30, 7, 1, 20])

    def keys(first, last, rank=0, world=1):
        draw = drawing(
            **({"repeats": 1} | options), labels=labels, seed=5, batch_size=12, per_class=4
        )
        order = TrainOrder(
            58,
            seed=5,
            batch_size=12,
            first=first,
            last=last,
            rank=rank,
            world_size=world,
            draw=draw,
        )
        return list(order)

    whole = keys(0, 20)
    assert keys(7, 20) == whole[7:]
    parts = [keys(0, 20, rank, 3) for rank in range(3)]
    assert [list(itertools.chain(*blocks)) for blocks in zip(*parts, strict=True)] == whole
    assert keys(0, 20) == whole
