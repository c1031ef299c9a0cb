"""The sums over a sample's pairs that a contrastive loss may need."""

from __future__ import annotations

from typing import Literal, NamedTuple

Over = Literal["others", "positives", "negatives"]


class Count(NamedTuple):
    """sum_j w_ij, with w_ij = 1, a_ij or 1 - a_ij for j != i, by `over`."""

    over: Over


class Total(NamedTuple):
    """sum_j w_ij s_ij."""

    over: Over


class LogSum(NamedTuple):
    """log sum_j w_ij e^(scale s_ij); 0, with gradient 0, for a sample whose weights are all 0."""

    over: Over
    scale: float = 1.0


Term = Count | Total | LogSum
