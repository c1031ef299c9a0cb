"""The sums over a sample's pairs that a loss may need, and these from `[N, N]` matrices by autograd."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._common import Labels, log_sum, not_self, shared_classes

Over = Literal["others", "positives", "negatives"]
Number = float | Float[Tensor, ""]
EXACT = 40.0  # beyond it softplus(x) = x to the last bit of float64


class Count(NamedTuple):
    """sum_j w_ij, with w_ij = 1, a_ij or 1 - a_ij for j != i, by `over`."""

    over: Over


class Total(NamedTuple):
    """sum_j w_ij s_ij."""

    over: Over


class LogSum(NamedTuple):
    """log sum_j w_ij e^(scale s_ij); 0, with gradient 0, for a sample whose weights are all 0."""

    over: Over
    scale: float = 1.0


Term = Count | Total | LogSum


class Pairs:
    """similarity: z_i . z_j / temperature. positive: a_ij. other: 1, but 0 for i = j. All `[N, N]`."""

    def __init__(self, features: Tensor, labels: Labels, temperature: float) -> None:
        self.similarity = features @ features.T / temperature
        self.positive = shared_classes(labels, labels, features.dtype)
        self.other = not_self(self.similarity).to(features.dtype)

    def weights(self, over: Over) -> Float[Tensor, "n n"]:
        """1, a_ij or 1 - a_ij; 0 for i = j."""
        if over == "others":
            return self.other
        return self.other * (self.positive if over == "positives" else 1 - self.positive)

    def sum(self, term: Term) -> Float[Tensor, " n"]:
        weights = self.weights(term.over)
        if isinstance(term, Count):
            return weights.sum(1)
        if isinstance(term, LogSum):
            return log_sum(term.scale * self.similarity, weights)
        return (weights * self.similarity).sum(1)


def sums(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    """As `pair_sums`."""
    return tuple(map(Pairs(features, labels, temperature).sum, terms))


def softplus_sum(features: Tensor, labels: Labels, temperature: float, level: Tensor) -> Tensor:
    """As `nearkin.functional._pairs.softplus_sum`."""
    pairs = Pairs(features, labels, temperature)
    softplus = F.softplus(level[:, None] - pairs.similarity, threshold=EXACT)
    return (pairs.weights("positives") * softplus).sum(1)


def sigmoid_sum(features: Tensor, labels: Labels, scale: Number, bias: Number) -> Tensor:
    """As `nearkin.functional._pairs.sigmoid_sum`."""
    pairs = Pairs(features, labels, 1.0)
    return (pairs.other * binary_losses(scale * pairs.similarity + bias, pairs.positive)).sum(1)


def binary_losses(scores: Tensor, positive: Tensor) -> Tensor:
    """a softplus(-s) + (1 - a) softplus(s) of every pair.

    Written as softplus(s) - a s, the small losses of pairs that are right would be differences of large numbers.
    """
    attraction, repulsion = (F.softplus(each, threshold=EXACT) for each in (-scores, scores))
    return positive * attraction + (1 - positive) * repulsion
