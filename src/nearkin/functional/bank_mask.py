"""Which entries of a bank each sample may use."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mask: TypeAlias = Bool[Tensor, "n k"] | Bool[Tensor, " k"]


def usable_entries(mask: Mask | None, scores: Float[Tensor, "n k"]) -> Bool[Tensor, "n k"]:
    """The mask for every pair of sample and entry; without a mask every entry may be used.

    Raises ValueError unless mask is `[N, K]` or `[K]`: broadcasting would hide the mistake.
    """
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if mask.shape not in (scores.shape, scores.shape[1:]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but must be {tuple(scores.shape)} "
            f"or {tuple(scores.shape[1:])}."
        )
    return mask.expand(scores.shape)
