"""The mean over views, ranking, and the accuracy of the nearest neighbours, against loops."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from nearkin.errors import DataError, DivergedError
from nearkin.evaluation import evaluator
from nearkin.evaluation.evaluator import knn_accuracy, mean_probabilities
from nearkin.evaluation.metrics import ranked


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mean_of_the_views_probabilities(views: int, dtype: torch.dtype) -> None:
    logits = torch.randn(views, 11, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = mean_probabilities(logits.flatten(0, 1), 11)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for image, row in enumerate(found.tolist()):
        for c, value in enumerate(row):
            expected = 0.0
            for view in logits[:, image].double().tolist():
                expected += math.exp(view[c]) / sum(map(math.exp, view)) / views
            assert value == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("classes", [1, 2, 5, 6, 40])
def test_ranking_is_a_stable_sort(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    rows = torch.randint(4, (200, classes), generator=generator) / 4  # many ties, zeros among them
    top, values = ranked(rows)
    order = [sorted(range(classes), key=lambda c: (-row[c], c))[:5] for row in rows.tolist()]
    assert top.tolist() == order
    assert torch.equal(values, rows.gather(1, top))


def neighbours(keys: Tensor, key_labels: Tensor, queries: Tensor, labels: Tensor, k: int) -> float:
    """The definition: cosines, the k largest, one vote each, ties by the sum of cosines."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    hits = 0
    for query, label in zip(queries.double().tolist(), labels.tolist(), strict=True):
        cosines = [cosine(query, key) for key in keys.double().tolist()]
        near = sorted(zip(cosines, key_labels.tolist(), strict=True), reverse=True)[:k]
        votes = Counter(c for _, c in near)
        weight: Counter[int] = Counter()
        for value, c in near:
            weight[c] += value
        hits += max(votes, key=lambda c: (votes[c], weight[c])) == label
    return hits / len(labels)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 1000])
@pytest.mark.parametrize("chunk", [1, 200, 2**24])
def test_knn_equals_the_loop(monkeypatch: pytest.MonkeyPatch, k: int, chunk: int) -> None:
    monkeypatch.setattr(evaluator, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(k)
    keys, queries = (torch.randn(n, 3, generator=generator) for n in (41, 37))
    keys *= torch.rand(41, 1, generator=generator) * 9 + 0.1  # the length plays no part
    key_labels, labels = (torch.randint(4, (n,), generator=generator) for n in (41, 37))
    expected = neighbours(keys, key_labels, queries, labels, k)
    assert knn_accuracy(keys, key_labels, queries, labels, k) == expected
    if k < 41:
        assert 0 < expected < 1


def test_knn_breaks_a_tie_by_the_nearer_class() -> None:
    keys = torch.tensor([[1.0, 0.2], [1.0, 0.1], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(keys, torch.tensor([0, 5, 1]), query, torch.tensor([5]), k=2) == 1
    assert knn_accuracy(keys, torch.tensor([5, 0, 1]), query, torch.tensor([5]), k=2) == 0
    # Two votes win over one, however near.
    assert knn_accuracy(keys, torch.tensor([1, 5, 1]), query, torch.tensor([1]), k=3) == 1


def test_knn_counts_a_class_that_training_lacks_as_wrong() -> None:
    keys = torch.eye(2)
    assert knn_accuracy(keys, torch.tensor([0, 1]), keys, torch.tensor([0, 9]), k=1) == 0.5


def test_knn_refuses_what_cannot_be_compared() -> None:
    rows, labels = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="needs images"):
        knn_accuracy(rows[:0], labels[:0], rows, labels)
    with pytest.raises(DataError, match="needs images"):
        knn_accuracy(rows, labels, rows[:0], labels[:0])
    for first, second in ((rows * torch.nan, rows), (rows, rows * torch.inf)):
        with pytest.raises(DivergedError, match="not finite"):
            knn_accuracy(first, labels, second, labels)
