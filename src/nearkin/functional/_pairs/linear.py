"""Counts and totals over pairs: linear in the other samples, so one sum per class replaces all pairs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._common import Hard, Labels
from nearkin.functional._pairs.plain import Count, Total


def linear_sum(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, term: Count | Total
) -> Float[Tensor, " n"]:
    """sum_j w_ij, or sum_j w_ij s_ij, of each sample; exactly 0 for a sample whose weights are all 0.

    Memory `[N, d]` for hard labels, `[N, C] + [C, d]` for soft ones.
    """
    linear = _hard if labels.ndim == 1 else _soft
    # A node of its own in the graph: parts of the gradient that cancel do so before anything else is added.
    return linear(features.clone(), labels, temperature, term).to(features.dtype)


def _hard(features: Tensor, labels: Hard, temperature: float, term: Count | Total) -> Tensor:
    x = features.new_ones(len(labels), 1) if isinstance(term, Count) else features
    if term.over == "others":
        summed = x.sum(0) - x
    else:
        index = _class_index(labels)
        per_class = torch.zeros_like(x).index_add(0, index, x)
        if term.over == "positives":
            summed = per_class.index_select(0, index) - x
        else:
            summed = (per_class.sum(0) - per_class).index_select(0, index)
    if isinstance(term, Count):
        return summed[:, 0]
    return (features * summed).sum(1) / temperature


def _class_index(labels: Hard) -> Tensor:
    """The labels numbered from 0 without gaps; torch.unique would wait for a GPU."""
    ordered, order = labels.sort()
    number = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter(0, order[1:], number)


def _soft(features: Tensor, labels: Tensor, temperature: float, term: Count | Total) -> Tensor:
    """sum_{j != i} a_ij x_j = sum_c y_ic (sum_j y_jc x_j - y_ic x_i), so that a class of one sample gives 0."""
    if features.device.type != "mps":  # which has no float64
        # A smoothed label shares more with itself than with all others: the difference loses digits.
        features = features.double()
    y = labels.detach().to(features.dtype)
    shared = (y * (y.sum(0) - y)).sum(1)
    count = _over(term, torch.full_like(shared, len(y) - 1), shared)
    if isinstance(term, Count):
        return count
    square = features.square().sum(1)
    by_class = features @ (y.T @ features).T - y * square[:, None]
    total = _over(term, features @ features.sum(0) - square, (y * by_class).sum(1))
    return total.where(count > 0, 0) / temperature


def _over(term: Count | Total, others: Tensor, positives: Tensor) -> Tensor:
    return {"others": others, "positives": positives, "negatives": others - positives}[term.over]
