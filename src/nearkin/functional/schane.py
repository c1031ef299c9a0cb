"""SCHaNe: supervised contrast whose negatives are weighed by their similarity to the anchor."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional.labels import Labels
from nearkin.functional.pairs import log_count, pair_sums
from nearkin.functional.per_anchor import PerAnchor
from nearkin.functional.precision import full_precision
from nearkin.functional.terms import Count, LogSum
from nearkin.functional.validity import masked


@full_precision
def schane(
    features: Float[Tensor, "n d"],
    labels: Labels,
    *,
    temperature: float,
    hardness: float,
    positives: Literal["mean", "sum"] = "mean",
) -> PerAnchor:
    """Supervised contrast with hard negatives.

        P_i  = mean (or sum) over P(i) of e^(s_ip)
        w_in = e^(h s_in) / mean over N(i) of e^(h s_ik)
        L_i  = -log( P_i / (P_i + sum over N(i) of w_in e^(s_in)) )
             = softplus( LSE_N((1 + h) s) - LSE_N(h s) + log|N| - log P_i )

    with s = z z' / temperature and h the hardness; the gradient flows through the weights w. With
    soft labels all sums and counts over P(i) are weighed with a_ij = sum_c y_ic y_jc, those over
    N(i) with 1 - a_ij.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    temperature > 0. hardness: 0 weighs all negatives alike, as published 1. positives: "mean", or
    "sum" as in the later CLCE.
    Invalid: an anchor without a positive. Without a negative its value is 0 and it is valid.
    Raises ValueError when temperature, positives or the shape of labels is wrong.
    Source: arXiv 2308.14893 and its code; "sum" arXiv 2402.14551; soft labels and validity are our
    choice.
    """
    if positives not in ("mean", "sum"):
        raise ValueError(f'positives is {positives!r} but must be "mean" or "sum".')
    positive, steeper, weights, positive_count, negative_count = pair_sums(
        features,
        labels,
        temperature,
        LogSum("positives"),
        LogSum("negatives", 1 + hardness),
        LogSum("negatives", hardness),
        Count("positives"),
        Count("negatives"),
    )
    attraction = positive - (log_count(positive_count) if positives == "mean" else 0)
    repulsion = steeper - weights + log_count(negative_count)
    value = F.softplus(repulsion - attraction).where(negative_count > 0, 0)
    return masked(value, positive_count > 0)
