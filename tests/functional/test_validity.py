"""Which anchors count, and that those which do not leave no trace."""

import pytest
import torch
from functional_cases import ALL, HARD, PAIRED, differentiated, make

from nearkin import functional as F

LONE = [0, 0, 1, 1, 2]
PER_SAMPLE = ["symmetric_ce", "consistency_kl", "varcon", "gpaco", "cross_entropy", "instance_nce"]
PER_SAMPLE += ["binary_cross_entropy", "instance_nce_bank"]


@pytest.mark.parametrize("name", PAIRED)
def test_a_lone_anchor_is_invalid(name):
    result = ALL[name](make(LONE), 0.1)
    assert result.valid.tolist() == [True, True, True, True, False]
    assert result.value[-1] == 0


@pytest.mark.parametrize("name", ["sincere", "schane", "schane_sum"])
def test_without_a_negative_the_value_is_zero_and_valid(name):
    result, gradients = differentiated(ALL[name], make([1, 1, 1]), 0.1)
    assert result.valid.all()
    assert result.value.tolist() == [0.0] * 3
    assert gradients[0].abs().max() == 0


def test_a_triplet_needs_a_negative():
    assert not F.triplet_batch_hard(make([1, 1, 1]).features, torch.ones(3).long(), margin=0.2)[
        1
    ].any()


@pytest.mark.parametrize("name", ["sigsup", "sigsup_sum"])
@pytest.mark.parametrize("labels", [LONE, [1, 1, 1], [0, 1, 2, 3], [2]])
def test_pairs_that_are_judged_alone_need_no_positive(name, labels):
    """Only a sample without any other is invalid."""
    result, gradients = differentiated(ALL[name], make(labels), 0.1)
    assert result.valid.tolist() == [len(labels) > 1] * len(labels)
    assert ((result.value > 0) == result.valid).all()
    assert (gradients[0].abs().amax(1) > 0).tolist() == result.valid.tolist()


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("labels", [LONE, [0], [1, 1, 1], [0, 1, 2, 3]])
def test_what_is_per_sample_is_always_valid(name, labels):
    assert ALL[name](make(labels), 0.1).valid.all()


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_valid_is_zero_with_gradient_zero(name, labels, dtype):
    result, gradients = differentiated(ALL[name], make(labels, dtype), 0.1)
    assert not result.valid.any()
    assert F.mean_valid(result) == 0
    assert [g.abs().max().item() for g in gradients] == [0, 0, 0]


@pytest.mark.parametrize("name", PAIRED)
def test_an_invalid_anchor_pulls_on_nothing(name):
    """The value of the lone anchor is 0 whatever the rows: its gradient is 0."""
    x = make(LONE)
    features = x.features.clone().requires_grad_()
    result = ALL[name](x._replace(features=features), 0.1)
    (gradient,) = torch.autograd.grad(result.value[-1], features)
    assert gradient.abs().max() == 0


def neighbours(x, **changes):
    features = x.features.clone().requires_grad_()
    given = {"bank": x.bank, "bank_labels": x.bank_labels, "mask": x.mask} | changes
    result = F.neighbour_nll(features, x.labels, temperature=0.1, topk=6, **given)
    (gradient,) = torch.autograd.grad(result.value.sum(), features)
    return result, gradient


def test_an_anchor_without_a_positive_neighbour_is_valid_with_value_zero():
    x = make(LONE)
    result, gradient = neighbours(x, bank_labels=torch.full((len(x.bank),), 3))
    assert result.valid.all()
    assert result.value.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("shared", [False, True])
def test_an_anchor_without_any_entry_is_invalid(shared):
    x = make(LONE)
    mask = torch.zeros(len(x.bank), dtype=torch.bool) if shared else x.mask.clone()
    if not shared:
        mask[1] = False
    result, gradient = neighbours(x, mask=mask)
    assert result.valid.tolist() == ([False] * 5 if shared else [True, False, True, True, True])
    assert gradient[1].abs().max() == 0
    assert gradient.isfinite().all()


def test_masked_entries_carry_no_weight_even_when_they_alone_are_positive():
    """topk reaches into the masked entries; all usable ones are of another class."""
    x = make([0, 0])
    bank_labels = torch.ones(len(x.bank), dtype=torch.long)
    bank_labels[:4] = 0
    result, gradient = neighbours(x, bank_labels=bank_labels, mask=torch.arange(12) >= 10)
    assert result.valid.all()
    assert result.value.tolist() == [0.0, 0.0]
    assert gradient.abs().max() == 0


def test_a_masked_entry_is_an_absent_entry():
    x = make(LONE)
    keep = torch.tensor([0, 2, 3, 5, 8])
    mask = torch.zeros(len(x.bank), dtype=torch.bool)
    mask[keep] = True
    for name in ("neighbour_nll", "gpaco", "consistency_kl"):
        masked = ALL[name](x._replace(mask=mask), 0.1)
        absent = ALL[name](
            x._replace(
                bank=x.bank[keep],
                bank_labels=x.bank_labels[keep],
                bank_probs=x.bank_probs[keep],
                mask=torch.ones(5, dtype=torch.bool),
            ),
            0.1,
        )
        torch.testing.assert_close(masked.value, absent.value)


def test_a_target_without_entries_says_nothing():
    x = make(LONE)
    nothing = torch.zeros(len(x.bank), dtype=torch.bool)
    target = F.neighbour_target(x.features, x.bank, x.bank_probs, temperature=0.1, mask=nothing)
    logits = x.logits.clone().requires_grad_()
    losses = F.consistency_kl(logits, target)
    (gradient,) = torch.autograd.grad(losses.value.sum(), logits)
    assert target.abs().max() == 0
    assert losses.value.abs().max() == 0
    assert gradient.abs().max() == 0


def test_empty_slots_are_of_no_class():
    """Hard and soft labels against a slot of class -1, without a mask."""
    x = make([0, 0])
    empty = torch.full((len(x.bank),), -1)
    soft = torch.nn.functional.one_hot(x.labels, 4).double()
    for labels in (x.labels, soft):
        for bank_labels in (empty, F.soft_pairs(empty)):
            at = x._replace(labels=labels)
            result, _ = neighbours(at, bank_labels=bank_labels, mask=None)
            assert result.value.abs().max() == 0
            assert result.valid.all()


@pytest.mark.parametrize("length", [1.0, 1.0 + 1e-6, 1.0 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, torch.pi])
def test_arcface_at_the_centre_of_a_class(length, dtype, angle):
    """There the root of 1 - cos^2 has no finite gradient, and rounding may take cos beyond 1."""
    weight = torch.eye(2, dtype=dtype)
    features = (length * weight[:1] * (1 if angle == 0 else -1)).requires_grad_()
    labels = torch.tensor([0])
    logits = F.arcface_logits(features, weight, labels, margin=0.5, scale=1.0)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert gradient.isfinite().all()
    expected = torch.cos(torch.tensor(angle + 0.5, dtype=dtype))
    torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=2e-3)


def test_every_function_is_listed():
    assert set(PAIRED) | set(PER_SAMPLE) | set(HARD) <= set(ALL)


def test_a_class_that_is_masked_out_does_no_harm():
    """Its logit is -inf. Expected by the same loss without that class."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 5, dtype=torch.float64)
    target = target.softmax(1)
    target[:, 2] = 0
    target /= target.sum(1, keepdim=True)
    kept = [0, 1, 3, 4]
    masked = logits.clone()
    masked[:, 2] = -torch.inf
    masked.requires_grad_()
    found = F.consistency_kl(masked, target).value
    torch.testing.assert_close(found, F.consistency_kl(logits[:, kept], target[:, kept]).value)
    (gradient,) = torch.autograd.grad(found.sum(), masked)
    assert gradient.isfinite().all()


def test_no_anchors_have_no_values():
    none, labels = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
    for result in (
        F.supcon_out(none, labels, temperature=0.1),
        F.triplet_batch_hard(none, labels, margin=0.1),
        F.cross_entropy(none, labels),
    ):
        assert result.value.shape == (0,)


def test_an_empty_bank_says_nothing():
    x = make([0, 0, 1])
    result = F.neighbour_nll(
        x.features, x.labels, x.bank[:0], x.bank_labels[:0], temperature=0.1, topk=3
    )
    assert result.value.tolist() == [0.0] * 3
