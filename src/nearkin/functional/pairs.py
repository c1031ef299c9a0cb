"""The pairs of a batch, and the sums over them that the contrastive functions share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearkin.functional.checks import check_labels, check_positive
from nearkin.functional.labels import Labels, positiveness


class Pairs(NamedTuple):
    """All pairs of N samples; a sample with itself weighs 0 everywhere. Each `[N, N]`.

    similarity: z_i . z_j / temperature. positive: a_ij. negative: 1 - a_ij. other: 1.
    """

    similarity: Float[Tensor, "n n"]
    positive: Float[Tensor, "n n"]
    negative: Float[Tensor, "n n"]
    other: Float[Tensor, "n n"]


def batch_pairs(features: Float[Tensor, "n d"], labels: Labels, temperature: float) -> Pairs:
    """Every sample with every other of the batch."""
    check_positive("temperature", temperature)
    check_labels(labels, len(features))
    similarity = features @ features.T / temperature
    other = not_self(similarity).to(features.dtype)
    positive = positiveness(labels, features.dtype)
    return Pairs(similarity, positive * other, (1 - positive) * other, other)


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
