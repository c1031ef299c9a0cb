"""Sums over a sample's pairs that are linear in the other samples: from one sum per class, without looking at pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional.labels import Hard
from nearkin.functional.terms import Count, Over, Total


class Classes(NamedTuple):
    """How many there are in a batch, and the place of each sample's among them, `[N]`."""

    number: int
    places: Tensor

    @classmethod
    def of(cls, labels: Hard) -> Classes:
        present, places = torch.unique(labels, return_inverse=True)
        return cls(len(present), places)


def linear_sum(
    features: Float[Tensor, "n d"], classes: Classes, temperature: float, term: Count | Total
) -> Float[Tensor, " n"]:
    """sum_j w_ij, or sum_j w_ij s_ij = z_i . sum_j w_ij z_j / temperature, of each sample."""
    if isinstance(term, Count):
        return _weighed_sums(features.new_ones(len(features), 1), classes, term.over)[:, 0]
    sums: Tensor = _WeighedSums.apply(features, classes, term.over)
    return (features * sums).sum(1) / temperature


class _WeighedSums(torch.autograd.Function):
    """`_weighed_sums`, whose weights are symmetric, so that the gradient is the same sum of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, classes: Classes, over: Over) -> Tensor:
        ctx.classes, ctx.over = classes, over
        return _weighed_sums(x, classes, over)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _WeighedSums.apply(gradient, ctx.classes, ctx.over), None, None


def _weighed_sums(x: Tensor, classes: Classes, over: Over) -> Tensor:
    """sum_j w_ij x_j over j != i, with w_ij = 1, a_ij or 1 - a_ij; exactly 0 for a sample without any weight."""
    if over == "others":
        return x.sum(0) - x
    sums = x.new_zeros(classes.number, x.shape[1]).index_add_(0, classes.places, x)
    if over == "negatives":
        return (sums.sum(0) - sums).index_select(0, classes.places)
    return sums.index_select(0, classes.places).sub_(x)
