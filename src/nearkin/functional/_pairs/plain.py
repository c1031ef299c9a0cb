"""Sums over pairs from `[N, N]` matrices, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._common import Labels, log_sum, not_self, shared_classes
from nearkin.functional._pairs.terms import Count, LogSum, Over, Term

EXACT = 40.0  # beyond it softplus(x) = x to the last bit of float64


class Pairs(NamedTuple):
    """similarity: z_i . z_j / temperature. positive: a_ij. other: 1, but 0 for i = j."""

    similarity: Float[Tensor, "n n"]
    positive: Float[Tensor, "n n"]
    other: Float[Tensor, "n n"]

    @classmethod
    def of(cls, features: Tensor, labels: Labels, temperature: float) -> Pairs:
        similarity = features @ features.T / temperature
        shared = shared_classes(labels, labels, features.dtype)
        return cls(similarity, shared, not_self(similarity).to(features.dtype))

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
    pairs = Pairs.of(features, labels, temperature)
    return tuple(map(pairs.sum, terms))


def softplus_sum(features: Tensor, labels: Labels, temperature: float, level: Tensor) -> Tensor:
    """As `nearkin.functional._pairs.softplus_sum`."""
    pairs = Pairs.of(features, labels, temperature)
    softplus = F.softplus(level[:, None] - pairs.similarity, threshold=EXACT)
    return (pairs.weights("positives") * softplus).sum(1)
