"""One case per function whose value can be said on paper."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from nearkin import functional as F

CONSTANT = torch.tensor([0.6, 0.8], dtype=torch.float64).expand(6, 2)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
CORNERS = torch.eye(2, dtype=torch.float64)[LABELS]  # each class its own axis
T = 0.2


def values(result):
    assert result.valid.all()
    return result.value.tolist()


def near(*expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("supcon", [F.supcon_out, F.supcon_in])
def test_supcon_of_constant_embeddings_is_log_of_the_others(supcon):
    assert values(supcon(CONSTANT, LABELS, temperature=T)) == near(*[math.log(5)] * 6)


@pytest.mark.parametrize("supcon", [F.supcon_out, F.supcon_in])
def test_supcon_of_classes_at_right_angles(supcon):
    large = math.log(3 + 2 * math.exp(-1 / T))
    small = math.log(1 + 4 * math.exp(-1 / T))
    result = supcon(CORNERS, LABELS, temperature=T)
    assert values(result) == near(*[large] * 4, *[small] * 2)


def test_the_two_supcons_differ_as_jensen_says():
    """One anchor with positives at cosines 1 and 0: the mean of the logs against the log of the mean."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.long)
    total = math.log(math.exp(1 / T) + 1)
    outside = F.supcon_out(rows, labels, temperature=T).value[0]
    inside = F.supcon_in(rows, labels, temperature=T).value[0]
    assert float(outside) == pytest.approx(total - 0.5 / T)
    assert float(inside) == pytest.approx(math.log(2))


def test_instance_nce_of_constant_embeddings():
    assert values(F.instance_nce(CONSTANT, CONSTANT, temperature=T)) == near(*[math.log(11)] * 12)


def test_sincere_of_constant_embeddings_counts_the_other_classes_only():
    large, small = math.log(1 + 2), math.log(1 + 4)
    assert values(F.sincere(CONSTANT, LABELS, temperature=T)) == near(*[large] * 4, *[small] * 2)


def test_sigsup_of_classes_at_right_angles():
    """Cosine 1 in a class and 0 between classes, with the scale and bias that SigLIP starts from."""
    same, other = math.log(2), math.log1p(math.exp(-10))
    sums = [3 * same + 2 * other] * 4 + [same + 4 * other] * 2
    start = {"log_scale": math.log(10), "bias": -10.0}
    assert values(F.sigsup(CORNERS, LABELS, **start, normalise="none")) == near(*sums)
    means = [value / positives for value, positives in zip(sums, [3] * 4 + [1] * 2, strict=True)]
    assert values(F.sigsup(CORNERS, LABELS, **start)) == near(*means)


def test_sigsup_is_the_published_loss_where_each_anchor_has_one_positive():
    rows, labels = CONSTANT[:4], torch.tensor([0, 0, 1, 1])
    numbers = {"log_scale": 0.5, "bias": -1.0}
    published = F.sigsup(rows, labels, **numbers, normalise="none")
    assert torch.equal(F.sigsup(rows, labels, **numbers).value, published.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigsup_of_extreme_scores_has_small_values_to_full_precision(dtype):
    """At scores of 80 and -80 a difference of large numbers would give 0; at 10^5 nothing overflows."""
    rows, small = CORNERS.to(dtype), math.exp(-80)
    right = F.sigsup(rows, LABELS, log_scale=math.log(160), bias=-80.0)
    expected = [(3 + 2) * small / 3] * 4 + [(1 + 4) * small] * 2
    assert values(right) == pytest.approx(expected, rel=1e-4)
    leaf = rows.clone().requires_grad_()
    wrong = F.sigsup(leaf, LABELS, log_scale=math.log(2e5), bias=-3e5)
    assert values(wrong) == pytest.approx([1e5] * 6, rel=1e-6)
    (gradient,) = torch.autograd.grad(wrong.value.sum(), leaf)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("hardness", [0.0, 1.0, 3.0])
def test_schane_of_constant_embeddings_does_not_depend_on_hardness(hardness):
    mean = F.schane(CONSTANT, LABELS, temperature=T, hardness=hardness)
    total = F.schane(CONSTANT, LABELS, temperature=T, hardness=hardness, positives="sum")
    assert values(mean) == near(*[math.log(1 + 2)] * 4, *[math.log(1 + 4)] * 2)
    assert values(total) == near(*[math.log(1 + 2 / 3)] * 4, *[math.log(1 + 4)] * 2)


def test_neighbours_of_constant_embeddings_share_attention_evenly():
    bank, bank_labels = CONSTANT[:5], torch.tensor([0, 0, 0, 1, -1])
    result = F.neighbour_nll(CONSTANT, LABELS, bank, bank_labels, temperature=T, topk=5)
    assert values(result) == near(*[math.log(5 / 3)] * 4, *[math.log(5)] * 2)


def test_only_the_nearest_neighbours_count():
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    settings = {"temperature": T, "topk": 2}
    nll = F.neighbour_nll(query, torch.tensor([1]), bank, torch.tensor([0, 1, 1]), **settings)
    assert values(nll) == near(math.log(1 + math.exp(0.2 / T)))


def test_target_of_constant_embeddings_is_the_mean_of_the_bank():
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.3, 0.7]], dtype=torch.float64)
    target = F.neighbour_target(CONSTANT, CONSTANT[:3], probabilities, temperature=T)
    assert target.tolist() == [near(0.6, 0.4)] * 6


def test_consistency_is_zero_at_the_target_and_log_c_from_certain_to_uniform():
    target = torch.tensor([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]], dtype=torch.float64)
    logits = torch.stack([target[0].log(), torch.zeros(3, dtype=torch.float64)])
    assert values(F.consistency_kl(logits, target)) == near(0, math.log(3))


def test_cross_entropy_of_uniform_logits():
    logits, labels = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 3])
    weights = torch.tensor([1.0, 1.0, 1.0, 3.0])
    assert values(F.cross_entropy(logits, labels, smoothing=0.2)) == near(*[math.log(4)] * 2)
    assert values(F.cross_entropy(logits, labels, class_weights=weights)) == near(
        math.log(4), 3 * math.log(4)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(smoothing, weighted):
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if weighted else None
    result = F.cross_entropy(logits, labels, smoothing=smoothing, class_weights=weights)
    theirs = torch.nn.functional.cross_entropy(
        logits, labels, weight=weights, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(result.value, theirs)


def test_symmetric_ce_of_uniform_logits():
    logits, labels = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 3])
    expected = 0.5 * math.log(4) + 2.0 * 9.210340371976182 * 0.75
    result = F.symmetric_ce(logits, labels, alpha=0.5, beta=2.0)
    assert values(result) == near(expected, expected)


def test_triplets_of_classes_at_right_angles():
    settings = {"margin": 2.0}
    assert values(F.triplet_batch_hard(CORNERS, LABELS, **settings)) == near(*[2 - 2**0.5] * 6)
    spread = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    result = F.triplet_batch_hard(spread, torch.tensor([0, 0, 1]), margin=0.3)
    assert result.value.tolist() == near(2.3 - 2**0.5, 2.3 - 2**0.5, 0)
    assert result.valid.tolist() == [True, True, False]


def test_margin_logits_at_the_centre_and_at_a_right_angle():
    weight = 5 * torch.eye(2, dtype=torch.float64)  # its length must not matter
    rows, labels = torch.eye(2, dtype=torch.float64)[[0, 0]], torch.tensor([0, 1])
    settings = {"margin": 0.4, "scale": 10.0}
    cosface = F.cosface_logits(rows, weight, labels, **settings)
    arcface = F.arcface_logits(rows, weight, labels, **settings)
    assert cosface.tolist() == [near(6, 0), near(10, -4)]
    assert arcface.tolist() == [near(10 * math.cos(0.4), 0), near(10, -10 * math.sin(0.4))]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gpaco_of_equal_scores_is_log_of_their_number(alpha):
    basis = torch.eye(9, dtype=torch.float64)
    logits = torch.zeros(4, 3, dtype=torch.float64)
    result = F.gpaco(
        basis[:4],
        torch.tensor([0, 0, 1, 2]),
        logits,
        basis[4:],
        torch.tensor([0, 1, 2, 0, -1]),
        alpha=alpha,
        temperature=T,
        smoothing=0.1,
    )
    assert values(result) == near(*[math.log(3 + 3 + 5)] * 4)


def test_varcon_of_one_class_and_of_equal_centres():
    one_class = F.varcon(CONSTANT, torch.zeros(6, dtype=torch.long), temperature=T, epsilon=0.1)
    assert values(one_class) == near(*[0.0] * 6)

    p = 1 / 3
    sharp = math.exp(1 / (T - 0.1 + 2 * 0.1 * p))
    q = sharp / (sharp + 2)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / 2 / p) - math.log(p)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    assert values(F.varcon(CONSTANT, labels, temperature=T, epsilon=0.1)) == near(*[expected] * 6)


def test_orthogonal_projection_of_classes_at_right_angles_and_of_constant_embeddings():
    ideal = F.orthogonal_projection(CORNERS, LABELS, gamma=0.5)
    collapsed = F.orthogonal_projection(CONSTANT, LABELS, gamma=0.5)
    assert float(ideal) == pytest.approx(0.0, abs=1e-6)
    assert float(collapsed) == pytest.approx(0.5, abs=1e-6)


def test_soft_labels_of_two_half_classes():
    """Two samples that are half A, half B: a = 1/2, so the sole pair is half positive, half negative."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    labels = 0.5 * one_hot(torch.tensor([[0, 1], [1, 0]]), 2).sum(1).double()
    assert values(F.supcon_out(rows, labels, temperature=T)) == near(0, 0)
    assert values(F.sincere(rows, labels, temperature=T)) == near(*[math.log(1.5)] * 2)
    schane = F.schane(rows, labels, temperature=T, hardness=1.0)
    assert values(schane) == near(*[math.log(1.5)] * 2)


def test_mean_valid_divides_by_the_valid_only():
    losses = F.PerAnchor(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True]))
    assert F.mean_valid(losses).item() == 2.0


def test_mean_valid_ignores_what_invalid_anchors_hold():
    value = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    mean = F.mean_valid(F.PerAnchor(value, torch.tensor([True, False, False])))
    (gradient,) = torch.autograd.grad(mean, value)
    assert mean.item() == 1.0
    assert gradient.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [0, 3])
def test_mean_valid_of_nothing_is_zero_with_gradient_zero(count):
    value = torch.full((count,), 7.0, requires_grad=True)
    mean = F.mean_valid(F.PerAnchor(value, torch.zeros(count, dtype=torch.bool)))
    (gradient,) = torch.autograd.grad(mean, value)
    assert mean.shape == ()
    assert mean.item() == 0.0
    assert gradient.tolist() == [0.0] * count
