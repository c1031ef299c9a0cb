"""Which anchors count."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearkin.functional.per_anchor import PerAnchor


def masked(value: Float[Tensor, " n"], valid: Bool[Tensor, " n"]) -> PerAnchor:
    """`value` where valid, 0 with gradient 0 elsewhere."""
    return PerAnchor(value.where(valid, 0), valid)


def all_valid(value: Float[Tensor, " n"]) -> PerAnchor:
    """`value` of functions whose anchors always count."""
    return PerAnchor(value, torch.ones_like(value, dtype=torch.bool))
