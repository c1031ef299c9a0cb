"""VarCon: samples against the class centres of the batch, the target following confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional.checks import check_hard_labels, check_positive
from nearkin.functional.labels import Hard
from nearkin.functional.per_anchor import PerAnchor
from nearkin.functional.precision import full_precision
from nearkin.functional.validity import all_valid

LEAST_TEMPERATURE = 1e-6  # as published: the target's temperature never falls below


@full_precision
def varcon(
    features: Float[Tensor, "n d"], labels: Hard, *, temperature: float, epsilon: float
) -> PerAnchor:
    """Variational contrast with class centres.

        w_c  = normalise(mean of the class's rows)
        p_i  = softmax_c( z_i . w_c / temperature )
        t_i  = max( temperature - epsilon + 2 epsilon p_iy, 1e-6 )
        q_ic proportional to e^(1/t_i) for c = y_i and to 1 otherwise
        L_i  = KL(q_i || p_i) - log p_iy

    over the classes present in the batch. No gradient flows through w; it does through q.

    features: `[N, d]` rows of unit length. labels: `[N]` integers. temperature > 0. epsilon >= 0.
    All anchors are valid. Raises ValueError when temperature, epsilon or labels are wrong.
    Source: Wang et al. 2025 (VarCon) and its code; taken in log space, as written it is NaN at
    temperature 0.01.
    """
    check_positive("temperature", temperature)
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon} but must not be below 0.")
    check_hard_labels(labels, len(features))
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
    # One column per class, its first sample's: to list the classes would stall the device.
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
