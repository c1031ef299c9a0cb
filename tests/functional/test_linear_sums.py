"""Sums that are linear in the other samples: what the whole matrix of weights gives, for hard and soft labels."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize, one_hot

from nearkin.functional._pairs import plain, tiled, tiles
from nearkin.functional._pairs.linear import linear_sum
from nearkin.functional._pairs.plain import Count, LogSum, Total

OVERS = ("others", "positives", "negatives")
HARD = torch.tensor([4, 0, 4, -1, 9, 0, 4, 2, 2, 7, -1])  # 9 and 7 stand alone
EYE = one_hot(torch.tensor([0, 1, 0, 2, 3, 1, 0, 4, 4, 5, 2]), 6).double()
SOFT = 0.7 * EYE + 0.3 * EYE.flip(0)  # the last row shares nothing with the fifth
LABELS = pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
each = pytest.mark.parametrize("over", OVERS)


def rows():
    draw = torch.Generator().manual_seed(5)
    return normalize(torch.randn(len(HARD), 3, generator=draw, dtype=torch.float64), dim=1)


def weights_of(labels, over):
    """Pair by pair, from the definition."""
    count = len(labels)
    weights = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            if labels.ndim == 1:
                shared = float(labels[i] == labels[j])
            else:
                shared = float(sum(a * b for a, b in zip(labels[i], labels[j], strict=True)))
            weight = {"others": 1.0, "positives": shared, "negatives": 1 - shared}[over]
            weights[i, j] = weight if i != j else 0.0
    return weights


@each
@LABELS
def test_counts_and_totals(labels, over):
    z, weights = rows(), weights_of(labels, over)
    count = linear_sum(z, labels, 0.2, Count(over))
    total = linear_sum(z, labels, 0.2, Total(over))
    torch.testing.assert_close(count, weights.sum(1), rtol=1e-14, atol=1e-14)
    wanted = (weights * (z @ z.T)).sum(1) / 0.2
    torch.testing.assert_close(total, wanted, rtol=1e-13, atol=1e-13)


@each
@LABELS
def test_derivatives(labels, over):
    """The second too."""

    def total(z):
        return linear_sum(z, labels, 0.2, Total(over))

    assert gradcheck(total, [rows().requires_grad_()])
    assert gradgradcheck(total, [rows().requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_without_any_weight_has_exactly_nothing(dtype):
    """Else a lone anchor would count as valid."""
    z = (rows() / 3).to(dtype)
    alone = (HARD == 9) | (HARD == 7)
    total = linear_sum(z, HARD, 0.2, Total("positives"))
    assert torch.equal(total == 0, alone)
    same = torch.full_like(HARD, 3)
    for term in (Count("negatives"), Total("negatives")):
        assert linear_sum(z, same, 0.2, term).eq(0).all()
    soft = torch.eye(len(HARD), dtype=dtype) * 0.4 + 0.1  # every class is shared ...
    soft[0] = 0
    soft = torch.cat([soft, torch.zeros_like(soft[:, :2])], 1)
    soft[0, -2:] = torch.tensor([0.3, 0.7])  # ... but the first sample's two
    count = linear_sum(z, soft, 0.2, Count("positives"))
    assert torch.equal(count == 0, torch.arange(len(HARD)) == 0)


@LABELS
def test_terms_come_back_in_the_order_asked(labels, monkeypatch):
    """Linear ones between the log sums, and log sums over the positives alone."""
    monkeypatch.setattr(tiles, "SHAPE", (4, 3))
    z = rows()
    terms = (
        Count("negatives"),
        LogSum("positives", 1.5),
        Total("others"),
        LogSum("positives"),
    )
    found = tiled.sums(z, labels, 0.2, terms)
    expected = plain.sums(z, labels, 0.2, terms)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
