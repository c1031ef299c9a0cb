"""Every function against a loop written from its equation."""

import math

import numpy as np
import pytest
import torch
from functional_cases import make, mixed

import oracles
from nearkin import functional as F

LABELS = {
    "balanced": [0, 1, 2, 0, 1, 2, 0, 1, 2],
    "lone": [0, 0, 0, 1, 1, 1, 1, 1, 2],
    "all equal": [3] * 7,
    "all distinct": [2, 0, 3, 1],
    "pair": [1, 1],
    "single": [2],
    "mixed": mixed([0, 0, 1, 1, 2, 2, 3], [1, 2, 3, 4, 5, 6, 0], 0.7),
    "one mixed": mixed([0, 0, 1, 1, 2, 2, 3], [0, 2, 2, 3, 4, 5, 6], 0.25),
    "disjoint": mixed([0, 0, 1, 1, 2], [1, 0, 3, 2, 4], 0.5),
}
HARD = [name for name, labels in LABELS.items() if isinstance(labels, list)]
every_labels = pytest.mark.parametrize("name", LABELS)
hard_labels = pytest.mark.parametrize("name", HARD)
temperature = pytest.mark.parametrize("t", [0.07, 0.5])


def arrays(*tensors):
    return [t.numpy() for t in tensors]


def agree(result, expected):
    value, valid = expected
    np.testing.assert_allclose(result.value, value, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(result.valid, valid)


@every_labels
@temperature
@pytest.mark.parametrize("function", ["supcon_out", "supcon_in", "sincere"])
def test_contrast(function, name, t):
    x = make(LABELS[name])
    expected = getattr(oracles, function)(*arrays(x.features, x.labels), t)
    agree(getattr(F, function)(x.features, x.labels, temperature=t), expected)


@every_labels
@temperature
@pytest.mark.parametrize("hardness", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("positives", ["mean", "sum"])
def test_schane(name, t, hardness, positives):
    x = make(LABELS[name])
    expected = oracles.schane(*arrays(x.features, x.labels), t, hardness, positives)
    result = F.schane(x.features, x.labels, temperature=t, hardness=hardness, positives=positives)
    agree(result, expected)


@every_labels
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (30.0, 4.0)])
@pytest.mark.parametrize("normalise", ["positives", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_sigsup(name, scale, bias, normalise, learned):
    x = make(LABELS[name])
    numbers = {"log_scale": math.log(scale), "bias": bias}
    expected = oracles.sigsup(*arrays(x.features, x.labels), *numbers.values(), normalise)
    if learned:
        numbers = {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}
    agree(F.sigsup(x.features, x.labels, **numbers, normalise=normalise), expected)


@temperature
@pytest.mark.parametrize("images", [1, 2, 6])
def test_instance_nce(images, t):
    x = make([0] * images)
    expected = oracles.instance_nce(*arrays(x.features, x.view2), t)
    agree(F.instance_nce(x.features, x.view2, temperature=t), expected)


@temperature
@pytest.mark.parametrize("mask", ["own", "nothing"])
def test_instance_nce_bank(t, mask):
    x = make(LABELS["lone"])
    allowed = x.mask if mask == "own" else torch.zeros_like(x.mask)
    rows = (x.features, x.view2, x.bank)
    expected = oracles.instance_nce_bank(*arrays(*rows), t, allowed.numpy())
    agree(F.instance_nce_bank(*rows, temperature=t, mask=allowed), expected)


@every_labels
def test_orthogonal_projection(name):
    x = make(LABELS[name])
    expected = oracles.orthogonal_projection(*arrays(x.features, x.labels), 0.5)
    result = F.orthogonal_projection(x.features, x.labels, gamma=0.5)
    assert result.shape == ()
    assert float(result) == pytest.approx(expected, rel=1e-10)


@hard_labels
@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_triplet(name, margin):
    x = make(LABELS[name])
    expected = oracles.triplet_batch_hard(*arrays(x.features, x.labels), margin)
    agree(F.triplet_batch_hard(x.features, x.labels, margin=margin), expected)


def bank_variants(x):
    """Bank labels as the function and as the oracle read them: hard ones, and mixed pairs."""
    labels = torch.stack([x.bank_labels, x.bank_labels.roll(3).clamp(min=0)], 1)
    labels[-2:] = -1
    share = torch.linspace(0.5, 1, len(labels), dtype=torch.float64)
    weights = torch.stack([share, 1 - share], 1)
    return {
        "hard": (x.bank_labels, x.bank_labels.numpy()),
        "pairs": (F.SoftPairs(labels, weights), (labels.numpy(), weights.numpy())),
    }


def mask_variants(x):
    starved = x.mask.clone()
    starved[0] = False
    return {
        "none": None,
        "own": x.mask,
        "starved": starved,
        "shared": x.bank_labels >= 0,
        "nothing": torch.zeros(len(x.bank), dtype=torch.bool),
    }


@every_labels
@pytest.mark.parametrize("topk", [1, 6, 100])
@pytest.mark.parametrize("stored", ["hard", "pairs"])
@pytest.mark.parametrize("mask", ["none", "own", "starved", "shared", "nothing"])
def test_neighbour_nll(name, topk, stored, mask):
    x = make(LABELS[name])
    allowed = mask_variants(x)[mask]
    bank_labels, plain_labels = bank_variants(x)[stored]
    expected = oracles.neighbour_nll(
        *arrays(x.features, x.labels, x.bank),
        plain_labels,
        0.1,
        topk,
        None if allowed is None else allowed.numpy(),
    )
    result = F.neighbour_nll(
        x.features, x.labels, x.bank, bank_labels, temperature=0.1, topk=topk, mask=allowed
    )
    agree(result, expected)


def test_neighbours_below_the_least_mass_count_as_none():
    """A positive at cosine -1 and a negative at 1 hold a mass of e^(-2/t): 2e-9, then 1.3e-8."""
    query, bank = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    labels, bank_labels = torch.tensor([0]), torch.tensor([1, 0])

    def at(t):
        return F.neighbour_nll(query, labels, bank, bank_labels, temperature=t, topk=2)

    assert at(0.1).value.tolist() == [0.0]
    assert at(0.1).valid.tolist() == [True]
    assert at(0.11).value.tolist() == pytest.approx([2 / 0.11])


@pytest.mark.parametrize("mask", ["none", "own", "starved", "shared", "nothing"])
@temperature
def test_neighbour_target(mask, t):
    x = make(LABELS["lone"])
    allowed = mask_variants(x)[mask]
    expected = oracles.neighbour_target(
        *arrays(x.features, x.bank, x.bank_probs),
        t,
        None if allowed is None else allowed.numpy(),
    )
    result = F.neighbour_target(x.features, x.bank, x.bank_probs, temperature=t, mask=allowed)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("mask", ["own", "starved", "nothing"])
def test_consistency_kl(mask):
    x = make(LABELS["lone"])
    target = F.neighbour_target(
        x.features, x.bank, x.bank_probs, temperature=0.07, mask=mask_variants(x)[mask]
    )
    target[1] = torch.tensor([0.0, 0.25, 0.75, 0.0])
    agree(F.consistency_kl(x.logits, target), oracles.consistency_kl(*arrays(x.logits, target)))


@every_labels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 4.0]])
@pytest.mark.parametrize("function", ["cross_entropy", "binary_cross_entropy"])
def test_cross_entropy(name, smoothing, weights, function):
    x = make(LABELS[name])
    expected = getattr(oracles, function)(*arrays(x.logits, x.labels), smoothing, weights)
    class_weights = None if weights is None else torch.tensor(weights)
    run = getattr(F, function)
    agree(run(x.logits, x.labels, smoothing=smoothing, class_weights=class_weights), expected)


@every_labels
@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_symmetric_ce(name, sharpness):
    x = make(LABELS[name])
    logits = sharpness * x.logits
    expected = oracles.symmetric_ce(*arrays(logits, x.labels), 0.7, 1.3)
    agree(F.symmetric_ce(logits, x.labels, alpha=0.7, beta=1.3), expected)


@hard_labels
@pytest.mark.parametrize("function", ["cosface_logits", "arcface_logits"])
def test_margin_logits(name, function):
    x = make(LABELS[name])
    expected = getattr(oracles, function)(*arrays(x.features, x.weight, x.labels), 0.35, 16.0)
    result = getattr(F, function)(x.features, x.weight, x.labels, margin=0.35, scale=16.0)
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)
    cosines = F.cosine_logits(3 * x.features, x.weight, scale=1.0)
    margin = getattr(F, function.replace("_logits", "_margin"))
    again = margin(cosines, x.labels, margin=0.35, scale=16.0)
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-9)
    plain = getattr(F, function)(x.features, x.weight, x.labels, margin=0.0, scale=16.0)
    np.testing.assert_allclose(F.cosine_logits(x.features, x.weight, scale=16.0), plain)


@every_labels
@pytest.mark.parametrize("stored", ["hard", "pairs"])
@pytest.mark.parametrize("mask", ["none", "starved", "nothing"])
def test_gpaco(name, stored, mask):
    x = make(LABELS[name])
    allowed = mask_variants(x)[mask]
    bank_labels, plain_labels = bank_variants(x)[stored]
    expected = oracles.gpaco(
        *arrays(x.features, x.labels, x.logits, x.bank),
        plain_labels,
        0.3,
        0.2,
        0.1,
        None if allowed is None else allowed.numpy(),
    )
    result = F.gpaco(
        x.features,
        x.labels,
        x.logits,
        x.bank,
        bank_labels,
        alpha=0.3,
        temperature=0.2,
        smoothing=0.1,
        mask=allowed,
    )
    agree(result, expected)


@hard_labels
@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("t", [0.01, 0.1, 0.5])
def test_varcon(name, epsilon, t):
    x = make(LABELS[name])
    expected = oracles.varcon(*arrays(x.features, x.labels), t, epsilon)
    agree(F.varcon(x.features, x.labels, temperature=t, epsilon=epsilon), expected)
