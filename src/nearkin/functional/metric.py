"""Losses on the geometry of a batch: batch-hard triplets, orthogonal projection, class centres (VarCon)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import check_amount, check_labels, check_positive, check_unit
from nearkin.functional._common import (
    Hard,
    Labels,
    PerAnchor,
    all_valid,
    full_precision,
    masked,
    not_self,
)
from nearkin.functional._pairs import Count, Total, pair_sums

LEAST_TEMPERATURE = 1e-6  # as published: the target's temperature never falls below
COUNT_EPSILON = 1e-6  # as published: added to both counts, so that no pairs give 0


@full_precision
def triplet_batch_hard(
    features: Float[Tensor, "n d"], labels: Hard, *, margin: float, validate: bool = True
) -> PerAnchor:
    """Hinge on the distance to the farthest positive against that to the nearest negative.

        L_i = max(0, max_{p in P(i)} |z_i - z_p| - min_{n in N(i)} |z_i - z_n| + margin)

    features: `[N, d]` rows of unit length; the distance is Euclidean, with gradient 0 between rows that coincide.
    labels: `[N]` integers. margin: 0.2 to 0.3 on unit rows. Invalid: an anchor without a positive or without a
    negative. Raises ValueError when labels are not `[N]` integers or margin is wrong. Source: Hermans et al. 2017,
    equation 5.
    """
    check_labels(labels, len(features), hard=True, validate=validate)
    check_unit(validate, features=features)
    check_amount("margin", margin)
    if len(labels) == 0:
        return masked(features.sum(1), labels < 0)
    same = labels[:, None] == labels
    positive = same & not_self(same)
    with torch.no_grad():
        # |z_i - z_j|^2 without |z_i|^2, which orders the partners of i alike.
        distance = features.square().sum(1) - 2 * features @ features.T
        farthest = distance.masked_fill(~positive, -torch.inf).argmax(1)
        nearest = distance.masked_fill(same, torch.inf).argmin(1)
    # Computed again from differences: the expanded square loses half the digits of near rows.
    pull = torch.linalg.vector_norm(features - features[farthest], dim=1)
    push = torch.linalg.vector_norm(features - features[nearest], dim=1)
    return masked((pull - push + margin).relu(), positive.any(1) & ~same.all(1))


@full_precision
def orthogonal_projection(
    features: Float[Tensor, "n d"], labels: Labels, *, gamma: float, validate: bool = True
) -> Float[Tensor, ""]:
    """One scalar for the batch: positive pairs should be parallel, negative pairs orthogonal.

        L = 1 - mean_a(z_i . z_j) + gamma mean_b(z_i . z_j)
        mean_w(x) = sum_{i != j} w_ij x_ij / (sum_{i != j} w_ij + 1e-6)

    with a_ij = sum_c y_ic y_jc and b_ij = 1 - a_ij; the cosines are signed. It contains no cross-entropy.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1. gamma: weight of the
    negative pairs. Without pairs of a kind their mean counts 0. Raises ValueError when the shape of labels is wrong.
    Source: Ranasinghe et al. 2021 and its code, without soft labels.
    """
    check_amount("gamma", gamma)
    check_labels(labels, len(features), validate=validate)
    check_unit(validate, features=features)
    terms = Total("positives"), Count("positives"), Total("negatives"), Count("negatives")
    sums = [each.sum() for each in pair_sums(features, labels, 1.0, *terms)]
    attraction = sums[0] / (sums[1] + COUNT_EPSILON)
    repulsion = sums[2] / (sums[3] + COUNT_EPSILON)
    return 1 - attraction + gamma * repulsion


@full_precision
def varcon(
    features: Float[Tensor, "n d"],
    labels: Hard,
    *,
    temperature: float,
    epsilon: float,
    validate: bool = True,
) -> PerAnchor:
    """Variational contrast with class centres.

        w_c  = normalise(mean of the class's rows)
        p_i  = softmax_c( z_i . w_c / temperature )
        t_i  = max( temperature - epsilon + 2 epsilon p_iy, 1e-6 )
        q_ic proportional to e^(1/t_i) for c = y_i and to 1 otherwise
        L_i  = KL(q_i || p_i) - log p_iy

    over the classes present in the batch. w has no gradient, q has.

    features: `[N, d]` rows of unit length. labels: `[N]` integers. temperature > 0. epsilon >= 0. All anchors are
    valid. Raises ValueError when temperature, epsilon or labels are wrong. Source: Wang et al. 2025 (VarCon) and its
    code; computed in log space: as published it is NaN at temperature 0.01.
    """
    check_positive("temperature", temperature)
    check_amount("epsilon", epsilon)
    check_labels(labels, len(features), hard=True, validate=validate)
    check_unit(validate, features=features)
    value = _against_centres(features, _centres(features, labels), labels, temperature, epsilon)
    return all_valid(value)


def _centres(features: Tensor, labels: Tensor) -> Tensor:
    """The centre of each sample's class `[N, d]`, without gradient."""
    same = (labels[:, None] == labels).to(features.dtype)
    return F.normalize(same @ features.detach(), dim=1)


def _against_centres(
    features: Tensor, centres: Tensor, labels: Tensor, temperature: float, epsilon: float
) -> Tensor:
    """The value of each sample given the centre of each sample's class."""
    same = labels[:, None] == labels
    # One column per class, that of its first sample: torch.unique would synchronise.
    repeated = same.tril(-1).any(1)
    others = ~same & ~repeated
    scores = (features @ centres.T / temperature).masked_fill(repeated, -torch.inf)
    log_p = scores.log_softmax(1)
    log_p_own = log_p.where(same & ~repeated, 0).sum(1)
    log_p_others = log_p.where(others, 0).sum(1)
    count = others.sum(1).to(features.dtype)

    sharpened = temperature - epsilon + 2 * epsilon * log_p_own.exp()
    inverse = 1 / sharpened.clamp(min=LEAST_TEMPERATURE)
    log_q_own = -F.softplus(count.log() - inverse)
    log_q_other = log_q_own - inverse
    divergence = log_q_own.exp() * (log_q_own - log_p_own)
    divergence = divergence + log_q_other.exp() * (count * log_q_other - log_p_others)
    return divergence - log_p_own
