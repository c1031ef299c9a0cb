"""Heads of a network: the projection of contrastive objectives, learned scale and bias, a cosine classifier."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nearkin.functional import cosine_logits

Norm = Literal["batch", "layer", "none"]
Slot = Literal["features", "embedding", "projection", "logits", "scale_bias"]


class Head(NamedTuple):
    """A part of the network that an objective defines: `module` reads one field of `Outputs` and writes another."""

    module: nn.Module
    reads: Slot
    writes: Slot


def projection_sizes(dim: int) -> tuple[int, int]:
    """(hidden, out) for features of width `dim`: max(2 dim, 256) up to 4096, and min(256, dim)."""
    return min(max(2 * dim, 256), 4096), min(256, dim)


def projection_head(dim: int, hidden: int, out: int, *, norm: Norm = "batch") -> nn.Sequential:
    """`[N, dim]` -> `[N, out]`: Linear -> norm -> ReLU -> Linear (with BatchNorm: CoNe, published code).

    The first layer has a bias only without BatchNorm, which would subtract it.
    """
    kinds: dict[Norm, list[nn.Module]] = {
        "batch": [nn.BatchNorm1d(hidden)],
        "layer": [nn.LayerNorm(hidden)],
        "none": [],
    }
    first = nn.Linear(dim, hidden, bias=norm != "batch")
    return nn.Sequential(first, *kinds[norm], nn.ReLU(inplace=True), nn.Linear(hidden, out))


class CosineClassifier(nn.Module):
    """Logits `[N, classes]` = scale * cosine(features `[N, dim]`, one learned vector per class), in float32."""

    def __init__(self, dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.weight, scale=self.scale)


class ScaleBias(nn.Module):
    """`[N, ...]` -> `[N, 2]`: the learned numbers log_scale and bias in every row, whatever the input.

    They have no dimensions, so that weight decay leaves them out as it does other biases (`parameter_groups`).
    """

    def __init__(self, log_scale: float, bias: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([self.log_scale, self.bias]).expand(len(rows), 2)
