"""Sums over the pairs of a batch, of which the contrastive functions are made.

A function names the sums that it needs; how they are computed is chosen here, by size: from `[N, N]` matrices
while these are small, else by tiles or strips, so that memory grows with N and not with its square.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nearkin.functional.checks import check_labels, check_positive
from nearkin.functional.labels import Labels, shared_classes
from nearkin.functional.strips import fused, in_strips
from nearkin.functional.terms import Count, LogSum, Over, Term
from nearkin.functional.tile_sums import EXACT, softplus_in_tiles, sums_in_tiles

LARGE = 512  # samples from which tiles are faster than matrices (measured: docs/performance.md)
LARGE_ON_GPU = 4096  # our guess: below, the matrices are small there and nothing has to be compiled
STEEP = 70.0  # e^70 times a million samples, and e^-70, are inside the range of float32

Sums = tuple[Tensor, ...]


class Pairs(NamedTuple):
    """M anchors with all N samples. similarity: z_i . z_j / temperature. positive: a_ij. other: 1, but 0 for i = j."""

    similarity: Float[Tensor, "m n"]
    positive: Float[Tensor, "m n"]
    other: Float[Tensor, "m n"]

    def weights(self, over: Over) -> Float[Tensor, "m n"]:
        """1, a_ij or 1 - a_ij; 0 for an anchor with itself."""
        if over == "others":
            return self.other
        return self.other * (self.positive if over == "positives" else 1 - self.positive)


def pair_sums(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, *terms: Term
) -> Sums:
    """The `terms` of each sample, `[N]` each. Of a large batch they can be differentiated once only.

    features: `[N, d]` rows of unit length, which bounds s by 1 / temperature. labels: `[N]` integers or `[N, C]` rows.
    Raises ValueError when temperature or the shape of labels is wrong. Source: our choice.
    """
    _check(features, labels, temperature)
    steepest = max((term.scale for term in terms if isinstance(term, LogSum)), default=0.0)
    way = _way(features, steepest / temperature)
    if way == "tiles":
        return sums_in_tiles(features, labels, temperature, terms)
    if way == "matrices":
        return _sums(labels, temperature, terms, features, _all(features))
    sums = fused(_sums) if way == "fused strips" else _sums
    return in_strips(partial(sums, labels, temperature, terms), features)


def softplus_sum(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, level: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """sum_p a_ip softplus(level_i - s_ip), `[N]`, differentiable in features and level; else as `pair_sums`."""
    _check(features, labels, temperature)
    way = _way(features, 0.0)  # nothing here can overflow
    if way == "tiles":
        return softplus_in_tiles(features, labels, temperature, level)
    if way == "matrices":
        return _softplus(labels, temperature, features, level, _all(features))[0]
    return in_strips(partial(fused(_softplus), labels, temperature), features, level)[0]


def not_self(square: Tensor) -> Bool[Tensor, "n n"]:
    """False on the diagonal, True elsewhere."""
    return ~torch.eye(len(square), dtype=torch.bool, device=square.device)


def log_sum(scores: Float[Tensor, "n k"], weights: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """log sum_j weights_ij e^(scores_ij); 0, with gradient 0, for a row without any weight.

    A row also counts as such when its weights lie on scores of -inf only. The caller masks these
    rows. They must not reach logsumexp, whose gradient is NaN where all is -inf.
    """
    weighted = scores + weights.log()
    empty = weighted.isneginf().all(1)
    return weighted.masked_fill(empty[:, None], 0).logsumexp(1).masked_fill(empty, 0)


def log_count(count: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log of a count; 0 where it is 0, since the caller masks those rows."""
    return count.where(count > 0, 1).log()


def _check(features: Tensor, labels: Labels, temperature: float) -> None:
    check_positive("temperature", temperature)
    check_labels(labels, len(features))


def _way(
    features: Tensor, steepness: float
) -> Literal["matrices", "tiles", "strips", "fused strips"]:
    """steepness: the largest factor of a cosine in an exponential."""
    if on_gpu(features):
        return "matrices" if len(features) < LARGE_ON_GPU else "fused strips"
    if len(features) < LARGE:
        return "matrices"
    # Strips are slower, but any temperature is safe: each exponential is shifted by its anchor's largest.
    return "tiles" if steepness <= STEEP else "strips"


def on_gpu(features: Tensor) -> bool:
    """Whether kernels are compiled for where these lie."""
    return features.is_cuda


def _all(features: Tensor) -> Tensor:
    return torch.arange(len(features), device=features.device)


def _pairs(features: Tensor, labels: Labels, temperature: float, anchors: Tensor) -> Pairs:
    similarity = features.index_select(0, anchors) @ features.T / temperature
    other = (anchors[:, None] != _all(features)).to(features.dtype)
    own = labels.index_select(0, anchors)
    return Pairs(similarity, shared_classes(own, labels, features.dtype), other)


def _sums(
    labels: Labels, temperature: float, terms: tuple[Term, ...], features: Tensor, anchors: Tensor
) -> Sums:
    """The terms of the anchors, from matrices."""
    pairs = _pairs(features, labels, temperature, anchors)
    return tuple(_sum(pairs, term) for term in terms)


def _softplus(
    labels: Labels, temperature: float, features: Tensor, level: Tensor, anchors: Tensor
) -> Sums:
    pairs = _pairs(features, labels, temperature, anchors)
    rises = F.softplus(level[anchors, None] - pairs.similarity, threshold=EXACT)
    return ((pairs.weights("positives") * rises).sum(1),)


def _sum(pairs: Pairs, term: Term) -> Tensor:
    weights = pairs.weights(term.over)
    if isinstance(term, Count):
        return weights.sum(1)
    if isinstance(term, LogSum):
        return log_sum(term.scale * pairs.similarity, weights)
    return (weights * pairs.similarity).sum(1)
