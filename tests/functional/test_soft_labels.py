"""Soft labels: one-hot rows are the hard labels, exactly; pairs of classes are rows, exactly."""

import pytest
import torch
from functional_cases import CLASSES, PAIRED, SOFT, differentiated, make, mixed
from torch.nn.functional import one_hot

from nearkin import functional as F

HARD_LABELS = [0, 0, 1, 1, 1, 2, 2, 3, 0, 1]
LABELS = {"some lone": HARD_LABELS, "all equal": [1] * 5, "all distinct": [3, 1, 0], "one": [2]}


def equal(first, second):
    """The same value, validity and gradients, to the last bit."""
    assert torch.equal(first[0].value, second[0].value)
    assert torch.equal(first[0].valid, second[0].valid)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_hot_rows_are_the_hard_labels(name, labels, dtype):
    hard = make(LABELS[labels], dtype)
    soft = hard._replace(labels=one_hot(hard.labels, CLASSES).to(dtype))
    equal(differentiated(SOFT[name], soft, 0.1), differentiated(SOFT[name], hard, 0.1))


@pytest.mark.parametrize("name", ["neighbour_nll", "gpaco"])
@pytest.mark.parametrize("labels", [HARD_LABELS, mixed(HARD_LABELS, range(9, -1, -1), 0.7)])
def test_pairs_of_one_class_are_the_hard_bank_labels(name, labels):
    hard = make(labels, torch.float32)
    soft = hard._replace(bank_labels=F.soft_pairs(hard.bank_labels))
    equal(differentiated(SOFT[name], soft, 0.1), differentiated(SOFT[name], hard, 0.1))


@pytest.mark.parametrize("name", SOFT)
def test_labels_carry_no_gradient(name):
    x = make(mixed(HARD_LABELS, range(9, -1, -1), 0.7))
    labels = x.labels.clone().requires_grad_()
    features, logits = x.features.clone().requires_grad_(), x.logits.clone().requires_grad_()
    total = F.mean_valid(
        SOFT[name](x._replace(labels=labels, features=features, logits=logits), 0.1)
    )
    assert torch.autograd.grad(total, labels, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("share", [1e-12, 1 - 1e-12])
def test_a_vanishing_share_is_the_hard_label(name, share):
    """Every class has partners on both sides, so that validity does not jump."""
    labels, partners = [0, 0, 1, 1, 2, 2, 3, 3], [2, 3, 4, 5, 6, 7, 0, 1]
    soft = make(mixed(labels, partners, share))
    kept = labels if share > 0.5 else [labels[i] for i in partners]
    hard = soft._replace(labels=torch.tensor(kept))
    first, second = SOFT[name](soft, 0.5), SOFT[name](hard, 0.5)
    torch.testing.assert_close(first.value, second.value, rtol=0, atol=1e-9)
    assert torch.equal(first.valid, second.valid)


@pytest.mark.parametrize("name", [name for name in PAIRED if name in SOFT])
def test_without_any_overlap_an_anchor_is_invalid(name):
    rows = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.2, 0.8], [0, 0, 0.9, 0.1]])
    result = SOFT[name](make(rows.double()), 0.1)
    assert result.valid.tolist() == [False, True, True]
    assert result.value[0] == 0


def test_soft_pairs_of_hard_labels():
    pairs = F.soft_pairs(torch.tensor([2, 0, -1]))
    assert pairs.labels.tolist() == [[2, 2], [0, 0], [-1, -1]]
    assert pairs.weights.tolist() == [[1, 0]] * 3


def test_soft_pairs_of_soft_rows():
    rows = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0], [0.25, 0.75, 0.0]])
    pairs = F.soft_pairs(rows)
    assert pairs.labels.tolist() == [[2, 0], [1, 1], [1, 0]]
    torch.testing.assert_close(
        pairs.weights, torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.75, 0.25]]), rtol=0, atol=0
    )


def test_soft_pairs_of_a_single_class():
    pairs = F.soft_pairs(torch.ones(2, 1))
    assert pairs.labels.tolist() == [[0, 0]] * 2
    assert pairs.weights.tolist() == [[1, 0]] * 2


def test_soft_pairs_hold_what_the_rows_held():
    rows = mixed(HARD_LABELS, range(9, -1, -1), 0.7)
    pairs = F.soft_pairs(rows)
    rebuilt = (one_hot(pairs.labels, CLASSES) * pairs.weights[..., None]).sum(1)
    assert torch.equal(rebuilt, rows)
