"""Several models as one: the mean of their probabilities, equal or weighted by what validation says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nearkin.errors import ModelError, printable

STEPS = 10_000
CLOSE = 1e-10  # change of the mean log likelihood at which the weights stand
LEAST = 1e-12


def mixed(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m p_m, `[N, C]` in float64, from each member's `[N, C]`; weights sum to 1."""
    parts = [w * p.double() for w, p in zip(weights, probabilities, strict=True)]
    return torch.stack(parts).sum(0)


def likelihood_weights(probabilities: Sequence[Tensor], labels: Tensor) -> list[float]:
    """The weights >= 0 with sum 1 that minimise the log loss of the mixture on `labels` `[N]`.

    w_m <- mean_i w_m p_m(y_i) / sum_k w_k p_k(y_i), expectation maximisation from equal weights. The log loss is convex
    in w, so this is the best there is. Source: Dempster et al. 1977; to weigh so is our choice.
    """
    rows = torch.arange(len(labels))
    own = torch.stack([p.double()[rows, labels] for p in probabilities]).clamp(min=LEAST)
    weights = own.new_full((len(own), 1), 1 / len(own))
    before = -torch.inf
    for _ in range(STEPS):
        joint = weights * own
        now = float(joint.sum(0).log().mean())
        if now - before < CLOSE:
            break
        before = now
        weights = (joint / joint.sum(0)).mean(1, keepdim=True)
    found: list[float] = (weights / weights.sum()).flatten().tolist()
    return found


def same_classes(own: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Raises ModelError when a member, called `name`, knows other classes than the first."""
    if set(own) != set(wanted):
        odd = sorted(set(own) ^ set(wanted))
        raise ModelError(
            f"The models of an ensemble must know the same classes; {printable(name)} differs in "
            f"{', '.join(printable(c) for c in odd[:3])}{', ...' if len(odd) > 3 else ''}."
        )


def columns(probabilities: Tensor, own: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The columns of a member with classes `own` in the order of `wanted`, which holds the same ones."""
    places = {c: number for number, c in enumerate(own)}
    return probabilities[:, [places[c] for c in wanted]]
