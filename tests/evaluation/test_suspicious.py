"""Suspicious labels: against a loop, and that flipped labels are found."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from nearkin.evaluation.suspicious import doubts, suspicion


def groups(n=60, classes=3, e=8, spread=0.15):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.eye(e)[:classes]
    return normalize(
        centres[labels] + spread * torch.randn(n, e, generator=generator), dim=1
    ), labels


def test_by_a_loop():
    embeddings, labels = groups(20, 4, spread=0.8)
    found, doubt = suspicion(embeddings, labels, k=5), doubts(embeddings, labels, k=5)
    for i in range(20):
        cosines = [float(embeddings[i] @ embeddings[j]) if j != i else -9.0 for j in range(20)]
        near = sorted(range(20), key=lambda j: -cosines[j])[:5]
        weights = [(1 + cosines[j]) / 2 for j in near]
        wrong = sum(w for w, j in zip(weights, near, strict=True) if labels[j] != labels[i])
        assert float(found[i]) == pytest.approx(wrong / sum(weights), abs=1e-5)
        votes = dict.fromkeys(range(4), 0.0)
        for w, j in zip(weights, near, strict=True):
            votes[int(labels[j])] += w / sum(weights)
        own = votes.pop(int(labels[i]))
        assert float(doubt.own[i]) == pytest.approx(own, abs=1e-5)
        assert float(doubt.share[i]) == pytest.approx(max(votes.values()), abs=1e-5)
        if max(votes.values()) > 0:
            assert votes[int(doubt.other[i])] == pytest.approx(max(votes.values()))
        else:
            assert doubt.other[i] == -1
    assert 0 < float(found.mean()) < 1


def test_flipped_labels_come_first():
    embeddings, labels = groups()
    flipped = torch.tensor([3, 17, 40])
    labels[flipped] = (labels[flipped] + 1) % 3
    found = suspicion(embeddings, labels)
    assert set(found.topk(3).indices.tolist()) == set(flipped.tolist())
    assert float(found[flipped].min()) > 0.9
    rest = torch.ones(60, dtype=torch.bool)
    rest[flipped] = False
    assert float(found[rest].max()) < 0.5


def test_few_images():
    assert suspicion(torch.ones(1, 2), torch.tensor([0])).tolist() == [0.0]
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert suspicion(opposite, torch.tensor([0, 1])).tolist() == [1.0, 1.0]
    assert suspicion(opposite, torch.tensor([1, 1])).tolist() == [0.0, 0.0]
