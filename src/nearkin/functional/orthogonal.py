"""Orthogonal projection: each class along one direction, other classes at right angles to it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nearkin.functional.labels import Labels
from nearkin.functional.pairs import pair_sums
from nearkin.functional.precision import full_precision
from nearkin.functional.terms import Count, Total

COUNT_EPSILON = 1e-6  # as published: added to both counts, so that no pairs give 0


@full_precision
def orthogonal_projection(
    features: Float[Tensor, "n d"], labels: Labels, *, gamma: float
) -> Float[Tensor, ""]:
    """One scalar for the batch: positive pairs should be parallel, negative pairs orthogonal.

        L = 1 - mean_a(z_i . z_j) + gamma mean_b(z_i . z_j)
        mean_w(x) = sum_{i != j} w_ij x_ij / (sum_{i != j} w_ij + 1e-6)

    with a_ij = sum_c y_ic y_jc and b_ij = 1 - a_ij; the cosines are signed. It has no cross-entropy
    inside.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    gamma: weight of the negative pairs. Without pairs of a kind their mean counts 0. Raises
    ValueError when the shape of labels is wrong.
    Source: Ranasinghe et al. 2021 and its code; soft labels are our choice.
    """
    terms = Total("positives"), Count("positives"), Total("negatives"), Count("negatives")
    sums = [each.sum() for each in pair_sums(features, labels, 1.0, *terms)]
    attraction = sums[0] / (sums[1] + COUNT_EPSILON)
    repulsion = sums[2] / (sums[3] + COUNT_EPSILON)
    return 1 - attraction + gamma * repulsion
