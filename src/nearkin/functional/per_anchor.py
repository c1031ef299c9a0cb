"""One value per anchor, and the one place where these become a scalar."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class PerAnchor(NamedTuple):
    """value: `[N]` the loss of each anchor (0 where invalid). valid: `[N]` whether it counts in the mean."""

    value: Float[Tensor, " n"]
    valid: Bool[Tensor, " n"]


def mean_valid(losses: PerAnchor) -> Float[Tensor, ""]:
    """Sum of the valid values divided by their count; 0, with gradient 0, when nothing is valid.

    The values already cover the gathered global batch, so nothing here knows of ranks. Source: our choice.
    """
    total = losses.value.where(losses.valid, losses.value.new_zeros(())).sum()
    return total / losses.valid.sum().clamp(min=1)
