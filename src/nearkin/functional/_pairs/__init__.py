"""Sums over the pairs of a batch, from which the contrastive losses are built.

A loss names the sums that it needs. Small batches take `[N, N]` matrices (`plain`), large ones tiles of them
(`tiled`), whose memory grows with N and not with its square.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._common import Labels
from nearkin.functional._pairs import plain, tiled
from nearkin.functional._pairs.plain import Count, LogSum, Number, Term, Total

__all__ = ["Count", "LogSum", "Number", "Total", "pair_sums", "sigmoid_sum", "softplus_sum"]

LARGE = 512  # samples from which tiles are faster on a CPU (measured: docs/performance.md)
LARGE_ON_GPU = 4096  # not measured: below, a matrix takes less than 64 MiB
# The tiles do not shift their exponentials. Up to these exponents, a million of them and their reciprocals stay
# within the range of the type.
STEEPEST = {torch.float32: 70.0, torch.float64: 690.0}


def pair_sums(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, *terms: Term
) -> tuple[Tensor, ...]:
    """The `terms` of each sample, `[N]` each, with s = z z' / temperature. Tiles can be differentiated once only.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows. Checks nothing.
    """
    steepest = max((term.scale for term in terms if isinstance(term, LogSum)), default=0.0)
    dtype = _tile_dtype(features, steepest / temperature)
    if dtype is None:
        return plain.sums(features, labels, temperature, terms)
    sums = tiled.sums(features.to(dtype), labels, temperature, terms)
    return tuple(each.to(features.dtype) for each in sums)


def softplus_sum(
    features: Float[Tensor, "n d"], labels: Labels, temperature: float, level: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """sum_p a_ip softplus(level_i - s_ip), `[N]`, differentiable in features and level; else as `pair_sums`."""
    if _tile_dtype(features, 0.0) is None:  # softplus cannot overflow
        return plain.softplus_sum(features, labels, temperature, level)
    return tiled.softplus_sum(features, labels, temperature, level)


def sigmoid_sum(
    features: Float[Tensor, "n d"], labels: Labels, scale: Number, bias: Number
) -> Float[Tensor, " n"]:
    """sum_{j != i} a_ij softplus(-s_ij) + (1 - a_ij) softplus(s_ij), `[N]`, with s = scale z z' + bias.

    Differentiable in features, scale and bias, any number of times; else as `pair_sums`.
    """
    if _tile_dtype(features, 0.0) is None:  # softplus cannot overflow
        return plain.sigmoid_sum(features, labels, scale, bias)
    return tiled.sigmoid_sum(features, labels, scale, bias)


def _tile_dtype(features: Tensor, steepness: float) -> torch.dtype | None:
    """The type of the tiles; None for matrices. steepness: the largest factor of a cosine in an exponential."""
    if len(features) < (LARGE if features.device.type == "cpu" else LARGE_ON_GPU):
        return None
    if steepness <= STEEPEST[features.dtype]:
        return features.dtype
    without_float64 = features.device.type == "mps"
    return None if without_float64 or steepness > STEEPEST[torch.float64] else torch.float64
