"""Gradients against finite differences in float64, with the stopped quantities held fixed."""

import pytest
import torch
from functional_cases import ALL, CLASSES, SOFT, differentiated, make, mixed
from torch.autograd import gradcheck, gradgradcheck

from nearkin import functional as F
from nearkin.functional.metric import _against_centres, _centres

HARD_LABELS = [0, 0, 1, 1, 2, 2, 2, 3]  # the last is a lone anchor
SOFT_LABELS = mixed(HARD_LABELS, [2, 1, 2, 4, 5, 6, 7, 0], 0.7)
T = 0.2


def check(run, sample):
    """`run(sample, T)` for those of features, second view and logits that it reads."""
    _, gradients = differentiated(run, sample, T)
    fields = zip(("features", "view2", "logits"), gradients, strict=True)
    names = [name for name, gradient in fields if gradient.abs().max() > 0]

    def function(*leaves):
        return run(sample._replace(**dict(zip(names, leaves, strict=True))), T).value

    assert names
    assert gradcheck(function, [getattr(sample, name).clone().requires_grad_() for name in names])


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("varcon", "consistency_kl")])
def test_hard_labels(name):
    check(ALL[name], make(HARD_LABELS))


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels(name):
    check(SOFT[name], make(SOFT_LABELS))


@pytest.mark.parametrize("name", ["neighbour_nll", "gpaco"])
def test_soft_bank(name):
    x = make(SOFT_LABELS)
    stored = F.soft_pairs(mixed(x.bank_labels.clamp(min=0), range(len(x.bank)), 0.6))
    check(SOFT[name], x._replace(bank_labels=stored))


@pytest.mark.parametrize("labels", [HARD_LABELS, SOFT_LABELS], ids=["hard", "soft"])
@pytest.mark.parametrize("normalise", ["positives", "none"])
def test_scale_and_bias_of_sigsup(labels, normalise):
    x = make(labels)
    numbers = (torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (1.5, -2.0))

    def function(features, log_scale, bias):
        options = {"log_scale": log_scale, "bias": bias, "normalise": normalise}
        return F.sigsup(features, x.labels, **options).value

    leaves = x.features.clone().requires_grad_(), *numbers
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_consistency_with_the_target_held_fixed():
    x = make(HARD_LABELS)
    target = F.neighbour_target(x.features, x.bank, x.bank_probs, temperature=T, mask=x.mask)
    logits = x.logits.clone().requires_grad_()
    assert gradcheck(lambda logits: F.consistency_kl(logits, target).value, [logits])


def test_no_gradient_flows_through_a_target():
    x = make(HARD_LABELS)
    key, bank, probabilities = (
        each.clone().requires_grad_() for each in (x.features, x.bank, x.bank_probs)
    )
    target = F.neighbour_target(key, bank, probabilities, temperature=T)
    assert not target.requires_grad

    soft = torch.full((8, CLASSES), 1 / CLASSES, dtype=torch.float64, requires_grad=True)
    logits = x.logits.clone().requires_grad_()
    total = F.mean_valid(F.consistency_kl(logits, soft))
    assert torch.autograd.grad(total, soft, allow_unused=True) == (None,)


@pytest.mark.parametrize("t", [0.05, T])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_varcon_with_the_centres_held_fixed(t, epsilon):
    x = make(HARD_LABELS)
    centres = _centres(x.features, x.labels)
    features = x.features.clone().requires_grad_()

    def fixed(features):
        return _against_centres(features, centres, x.labels, t, epsilon)

    assert gradcheck(fixed, [features])
    (expected,) = torch.autograd.grad(fixed(features).sum(), features)
    value = F.varcon(features, x.labels, temperature=t, epsilon=epsilon).value
    (gradient,) = torch.autograd.grad(value.sum(), features)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("function", [F.cosface_logits, F.arcface_logits])
def test_margin_logits_for_the_class_weights(function):
    x = make(HARD_LABELS)
    weight = x.weight.clone().requires_grad_()
    assert gradcheck(lambda w: function(x.features, w, x.labels, margin=0.3, scale=4.0), [weight])


def test_cross_entropy_with_class_weights():
    x = make(SOFT_LABELS)
    logits, weights = x.logits.clone().requires_grad_(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    assert gradcheck(
        lambda x_: F.cross_entropy(x_, x.labels, smoothing=0.1, class_weights=weights).value,
        [logits],
    )
