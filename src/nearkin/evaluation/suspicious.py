"""Suspicious labels: training images whose nearest kin have other labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 24  # similarities held at once: 64 MiB


class Doubt(NamedTuple):
    """What the kin of N images say. own: share of weight for the label. other: the label besides it that has most,
    -1 for none. share: of that one. All `[N]`."""

    own: Tensor
    other: Tensor
    share: Tensor


def suspicion(embeddings: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """How much the k nearest others of each image disagree with its label, `[N]` in [0, 1]: 1 - `doubts(...).own`."""
    return 1 - doubts(embeddings, labels, k).own


def doubts(embeddings: Tensor, labels: Tensor, k: int = 10) -> Doubt:
    """The shares v_i(c) = sum_j w_ij [y_j = c] / sum_j w_ij over the min(k, N - 1) rows j != i with the largest cosine.

    w_ij = (1 + cos(i, j)) / 2, so that nearer rows count more. A single row has its own label with 1.

    embeddings: `[N, e]` rows of unit length. labels: `[N]` class numbers. Time grows with N^2; memory: 64 MiB of
    similarities at a time.
    """
    count = len(labels)
    most = min(k, count - 1)
    if most < 1:
        return Doubt(torch.ones(count), torch.full((count,), -1), torch.zeros(count))
    parts = []
    for rows in torch.split(torch.arange(count), max(1, CHUNK // count)):
        cosines = embeddings[rows] @ embeddings.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf  # leave the image itself out
        values, index = cosines.topk(most, dim=1)
        weights = ((1 + values) / 2).clamp(min=1e-6)
        parts.append(_doubts(labels[rows], labels[index], weights / weights.sum(1, keepdim=True)))
    return Doubt(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _doubts(labels: Tensor, near: Tensor, weights: Tensor) -> Doubt:
    """labels: `[n]`. near: `[n, k]` labels of kin. weights: `[n, k]`, rows sum to 1."""
    agrees = near == labels[:, None]
    # Of each kin, the weight of all kin with its label.
    alike = ((near[:, :, None] == near[:, None, :]) * weights[:, None, :]).sum(2)
    share, place = alike.masked_fill(agrees, 0.0).max(1)
    other = near.gather(1, place[:, None])[:, 0].masked_fill(share == 0, -1)
    return Doubt((weights * agrees).sum(1).clamp(max=1.0), other, share)
