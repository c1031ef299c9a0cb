"""Sums over a sample's pairs that are linear in the other samples: from one sum per class, where labels are hard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional.labels import Labels, shared_classes
from nearkin.functional.terms import Count, Over, Total

ROWS = 128  # of soft labels at a time: memory linear in the batch


def linear_sum(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, term: Count | Total
) -> Float[Tensor, " n"]:
    """sum_j w_ij, or sum_j w_ij s_ij = z_i . sum_j w_ij z_j / temperature, of each sample."""
    if isinstance(term, Count):
        ones = torch.ones_like(features[:, :1], requires_grad=False)
        return _weighed_sums(ones, labels, term.over)[:, 0]
    sums: Tensor = _WeighedSums.apply(features, labels, term.over)
    return (features * sums).sum(1) / temperature


class _WeighedSums(torch.autograd.Function):
    """sum_j w_ij x_j, `[N, d]`. The weights are symmetric, so that the gradient is the same sum of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Labels, over: Over) -> Tensor:
        ctx.over = over
        ctx.save_for_backward(labels)
        return _weighed_sums(x, labels, over)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (labels,) = ctx.saved_tensors
        return _WeighedSums.apply(gradient, labels, ctx.over), None, None


def _weighed_sums(x: Tensor, labels: Labels, over: Over) -> Tensor:
    """sum_j w_ij x_j over j != i, with w_ij = 1, a_ij or 1 - a_ij; exactly 0 for a sample without any weight."""
    if over == "others":
        return x.sum(0) - x
    if labels.ndim == 2:
        return torch.cat([weights @ x for weights in _soft_weights(labels, over, x.dtype)])
    classes, index = torch.unique(labels, return_inverse=True)
    sums = x.new_zeros(len(classes), x.shape[1]).index_add_(0, index, x)
    if over == "negatives":
        return (sums.sum(0) - sums).index_select(0, index)
    return sums.index_select(0, index).sub_(x)


def _soft_weights(labels: Tensor, over: Over, dtype: torch.dtype) -> Iterator[Tensor]:
    """Some rows at a time. From sums over the classes a sample's share in itself, often far more than what it shares
    with all others, would have to be taken off."""
    for start in range(0, len(labels), ROWS):
        weights = shared_classes(labels[start : start + ROWS], labels, dtype)
        if over == "negatives":
            weights = 1 - weights
        weights.diagonal(start).zero_()
        yield weights
