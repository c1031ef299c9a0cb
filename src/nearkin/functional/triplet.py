"""Batch-hard triplets: each anchor with its farthest positive and its nearest negative."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional.checks import check_hard_labels
from nearkin.functional.labels import Hard
from nearkin.functional.pairs import not_self
from nearkin.functional.per_anchor import PerAnchor
from nearkin.functional.precision import full_precision
from nearkin.functional.validity import masked


@full_precision
def triplet_batch_hard(features: Float[Tensor, "n d"], labels: Hard, *, margin: float) -> PerAnchor:
    """Hinge on the distance to the farthest positive against that to the nearest negative.

        L_i = max(0, max_{p in P(i)} |z_i - z_p| - min_{n in N(i)} |z_i - z_n| + margin)

    features: `[N, d]` rows of unit length; the distance is Euclidean, with gradient 0 between rows
    that coincide.
    labels: `[N]` integers. margin: 0.2 to 0.3 on unit rows. Invalid: an anchor without a positive
    or without a negative. Raises ValueError when labels are not `[N]` integers. Source: Hermans et
    al. 2017, equation 5.
    """
    check_hard_labels(labels, len(features))
    same = labels[:, None] == labels
    positive = same & not_self(same)
    with torch.no_grad():
        # |z_i - z_j|^2 without |z_i|^2, which orders the partners of i alike.
        distance = features.square().sum(1) - 2 * features @ features.T
        farthest = distance.masked_fill(~positive, -torch.inf).argmax(1)
        nearest = distance.masked_fill(same, torch.inf).argmin(1)
    # Measured again from differences: the expanded square loses half the digits of near rows.
    pull = torch.linalg.vector_norm(features - features[farthest], dim=1)
    push = torch.linalg.vector_norm(features - features[nearest], dim=1)
    return masked((pull - push + margin).relu(), positive.any(1) & ~same.all(1))
