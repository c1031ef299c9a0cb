"""Kin with their weights and votes, against a loop over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tests.evaluation.test_kin import random_kin

from nearkin.evaluation.kin import nearest
from nearkin.evaluation.kinship import SHOWN, kinship


def by_hand(kin, query, leave_out=None):
    """Rows from the nearest on, and the votes of the first `kin.neighbours` with and without the ten nearest."""
    cosines = [float(query @ key / query.norm()) for key in kin.embeddings]
    order = sorted((r for r in range(len(cosines)) if r != leave_out), key=lambda r: -cosines[r])

    def vote(rows):
        powers = {r: math.exp(cosines[r] / kin.temperature) for r in rows}
        shares = dict.fromkeys(range(4), 0.0)
        for r, power in powers.items():
            shares[int(kin.labels[r])] += power / sum(powers.values())
        return shares

    k = kin.neighbours
    return order, vote(order[:k]), vote(order[SHOWN : SHOWN + k])


@pytest.mark.parametrize("neighbours", [9, 14, 100])
@pytest.mark.parametrize("own", [False, True])
def test_by_a_loop(neighbours, own):
    kin = random_kin(neighbours=neighbours)
    queries = kin.embeddings[:5] if own else 3 * torch.randn(5, 6, generator=torch.Generator())
    found = kinship(kin, queries, 4, torch.arange(5) if own else None)
    for row, query in enumerate(queries):
        order, with_all, without = by_hand(kin, query, row if own else None)
        most = min(SHOWN, neighbours)
        assert found.index[row].tolist() == order[:most] + [-1] * (SHOWN - most)
        assert found.votes[row][0].label == max(with_all, key=with_all.get)
        for vote in found.votes[row]:
            assert vote.share == pytest.approx(with_all[vote.label], abs=1e-4)
            assert vote.without == pytest.approx(without[vote.label], abs=1e-4)
        winner = max(without, key=without.get)
        assert winner in [vote.label for vote in found.votes[row]]


def test_the_weights_are_those_of_nearest():
    kin = random_kin(neighbours=30)
    queries = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    found, expected = kinship(kin, queries, 4), nearest(kin, queries)
    assert found.index.tolist() == expected.index[:, :SHOWN].tolist()
    assert found.weight == pytest.approx(expected.weight[:, :SHOWN].numpy(), abs=1e-6)


def test_an_image_is_not_its_own_kin_even_with_a_copy():
    kin = random_kin()
    kin.embeddings[7] = kin.embeddings[3]
    found = kinship(kin, kin.embeddings[[3, 7]], 4, torch.tensor([3, 7]))
    assert 3 not in found.index[0]
    assert 7 not in found.index[1]
    assert found.index[0, 0] == 7
    assert found.index[1, 0] == 3


def test_few_training_images():
    kin = random_kin(n=3)
    found = kinship(kin, torch.randn(2, 6), 4)
    assert (found.index[:, 3:] == -1).all()
    assert found.weight.sum(1) == pytest.approx([1, 1])
    assert all(vote.without == 0 for votes in found.votes for vote in votes)
    one = kinship(random_kin(n=1), torch.randn(1, 6), 4, torch.tensor([0]))
    assert one.index[0, 0] == 0
