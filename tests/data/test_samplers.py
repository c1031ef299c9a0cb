"""What an epoch draws: counted, not trusted."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearkin.bank import NeighbourBank
from nearkin.data.sampling import TrainOrder, balanced, drawing, repeated, shuffled, weighted

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


def per_batch(labels, rows, batch):
    """How many images of each class every batch holds."""
    return [Counter(labels[rows[i : i + batch]].tolist()) for i in range(0, len(rows), batch)]


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 4) | st.integers(1, 40), min_size=1, max_size=25),
    per_class=st.integers(1, 5),
    groups_in_batch=st.integers(1, 6),
    epoch=st.integers(0, 9),
)
def test_balanced_keeps_its_rules_for_any_classes(sizes, per_class, groups_in_batch, epoch):
    labels, batch = labels_of(sizes), per_class * groups_in_batch
    steps = len(labels) // batch
    draws = balanced(labels, 3, epoch, batch, per_class)
    rows = draws.rows
    assert len(rows) == steps * batch
    assert len(set(rows.tolist())) == len(rows)
    assert not draws.occurrences.any()
    held = per_batch(labels, rows, batch)
    small = [c for c, size in enumerate(sizes) if size < per_class]
    # A short group is cut only between a batch and the next: in all, at most once per step.
    assert sum(max(0, sum(c in counts for counts in held) - 1) for c in small) <= max(0, steps - 1)
    # Short places are whole in number, so what a batch holds beside whole groups is a multiple of a group.
    beside = [sum(n % per_class for c, n in counts.items() if c not in small) for counts in held]
    short = [sum(n for c, n in counts.items() if c in small) for counts in held]
    assert all((a + b) % per_class == 0 for a, b in zip(beside, short, strict=True))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("per_class", [2, 3, 4])
def test_every_image_gets_its_turn(name, per_class):
    labels, batch = labels_of(SIZES[name]), 2 * per_class
    drawn = set()
    for epoch in range(40):
        drawn |= set(balanced(labels, 3, epoch, batch, per_class).rows.tolist())
    assert drawn == set(range(len(labels)))


def test_a_small_class_is_drawn_each_epoch_though_nothing_is_left_over_to_fill_its_place():
    labels = labels_of([40] * 10 + [3])
    for epoch in range(5):
        held = per_batch(labels, balanced(labels, 0, epoch, 16, 4).rows, 16)
        assert sorted(counts[10] for counts in held)[-2:] == [0, 3]


def test_groups_lie_whole_in_a_batch():
    labels = labels_of([40, 40, 40, 40])
    for epoch in range(3):
        for counts in per_batch(labels, balanced(labels, 0, epoch, 16, 4).rows, 16):
            assert all(count % 4 == 0 for count in counts.values())


@pytest.mark.parametrize(("sizes", "per_class"), [([3] * 40, 4), ([7] * 40, 4), ([5] * 60, 6)])
def test_short_groups_and_left_over_images_find_kin(sizes, per_class):
    """One by one in any order, or cut at every place, a sixth of the anchors and more would be alone."""
    labels, batch, lone = labels_of(sizes), 8 * per_class, 0
    rows = [balanced(labels, 0, epoch, batch, per_class).rows for epoch in range(20)]
    for epoch in rows:
        lone += sum(list(counts.values()).count(1) for counts in per_batch(labels, epoch, batch))
    assert lone / sum(map(len, rows)) < 0.05


def test_a_class_may_have_several_groups_in_a_batch_and_few_images_are_one_short_group():
    labels = labels_of([60, 3, 1])
    rows = balanced(labels, 0, 0, 16, 4).rows
    assert max(counts[0] for counts in per_batch(labels, rows, 16)) > 4
    for epoch in range(20):
        rows = balanced(labels, 0, epoch, 16, 4).rows
        assert sorted(counts[1] for counts in per_batch(labels, rows, 16)) in (
            [0, 0, 0, 3],
            [0, 0, 1, 2],
        )


def test_left_over_images_take_turns():
    """Five images in groups of four: each epoch leaves another one out, in five epochs every image once."""
    labels = labels_of([5, 5, 5, 5])
    left = [set(range(20)) - set(balanced(labels, 0, e, 16, 4).rows.tolist()) for e in range(5)]
    assert all(len(out) == 4 for out in left)
    assert set(itertools.chain(*left)) == set(range(20))


def test_partners_change_from_epoch_to_epoch():
    labels, together = labels_of([40, 40]), set()
    for epoch in range(20):
        for group in balanced(labels, 0, epoch, 4, 4).rows.reshape(-1, 4).tolist():
            together |= set(itertools.combinations(sorted(group), 2))
    assert len(together) > 1000  # of 1560 pairs; the same groups each epoch would give 120


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


@pytest.mark.parametrize(("batch", "repeats"), [(8, 2), (12, 3), (16, 3), (5, 4), (7, 7)])
def test_repeats_share_a_batch_and_differ_in_occurrence(batch, repeats):
    draws = repeated(100, 0, 0, batch, repeats)
    assert len(draws.rows) == 100
    earlier = set()
    for i in range(0, 100 // batch * batch, batch):
        copies = defaultdict(list)
        for row, number in zip(*(column[i : i + batch].tolist() for column in draws), strict=True):
            copies[row].append(number)
        counts = sorted(map(len, copies.values()), reverse=True)
        assert counts[: batch // repeats] == [repeats] * (batch // repeats)
        assert counts[batch // repeats :] == [batch % repeats][: batch % repeats]
        assert all(sorted(numbers) == list(range(len(numbers))) for numbers in copies.values())
        assert not earlier & copies.keys()
        earlier |= copies.keys()
    assert set(draws.rows.tolist()) != set(repeated(100, 0, 1, batch, repeats).rows.tolist())


def test_the_options_choose_what_is_drawn():
    labels = labels_of([30, 7, 1, 20])

    def drawn(sampler, repeats=1):
        draw = drawing(sampler, labels, seed=5, batch_size=12, per_class=4, repeats=repeats)
        return [column.tolist() for column in draw(2)]

    def lists(draws):
        return [column.tolist() for column in draws]

    assert drawn("weighted") == lists(weighted(labels, 5, 2))
    assert drawn("balanced") == lists(balanced(labels, 5, 2, 12, 4))
    assert drawn("shuffle", repeats=3) == lists(repeated(58, 5, 2, 12, 3))
    assert drawn("shuffle") == lists(shuffled(58, 5, 2))


def test_copies_of_an_image_are_not_side_by_side():
    rows = repeated(3000, 0, 0, 300, 3).rows
    assert (rows[1:] == rows[:-1]).mean() < 0.03  # in a row they would be 0.67


def test_a_bank_masks_every_copy_of_an_image():
    rows = torch.from_numpy(repeated(24, 0, 0, 12, 3).rows[:12])
    bank = NeighbourBank(12, 4)
    bank.write(torch.eye(4).repeat(3, 1), torch.zeros(12, dtype=torch.int64), None, rows)
    usable = bank.usable(rows)
    assert torch.equal(usable, rows[:, None] != rows[None, :])
    assert usable.sum(1).tolist() == [9] * 12


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
