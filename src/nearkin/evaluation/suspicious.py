"""Suspicious labels: training images whose nearest kin have other labels."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24  # similarities held at once: 64 MiB


def suspicion(embeddings: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """How much the k nearest others of each image disagree with its label, `[N]` in [0, 1].

    s_i = sum_j w_ij [y_j != y_i] / sum_j w_ij over the min(k, N - 1) rows j != i with the largest cosine, of weight
    w_ij = (1 + cos(i, j)) / 2, so that nearer rows count more. 0 for a single row.

    embeddings: `[N, e]` rows of unit length. labels: `[N]` class numbers. Time grows with N^2; memory: 64 MiB of
    similarities at a time.
    """
    count = len(labels)
    most = min(k, count - 1)
    if most < 1:
        return torch.zeros(count)
    parts = []
    for rows in torch.arange(count).split(max(1, CHUNK // count)):
        cosines = embeddings[rows] @ embeddings.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf  # leave the image itself out
        values, index = cosines.topk(most, dim=1)
        weights = ((1 + values) / 2).clamp(min=1e-6)
        others = labels[index] != labels[rows, None]
        parts.append((weights * others).sum(1) / weights.sum(1))
    return torch.cat(parts).float()
