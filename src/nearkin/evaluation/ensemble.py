"""Several models as one: the mean of their probabilities, equal or weighted by what validation says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nearkin.errors import DivergedError, ModelError, printable

STEPS = 10_000
CLOSE = 1e-6  # nats between the log loss found and the least possible
LEAST = 1e-12


def mixed(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m p_m, `[N, C]` in float64, from each member's `[N, C]`; weights sum to 1."""
    parts = [w * p.double() for w, p in zip(weights, probabilities, strict=True)]
    return torch.stack(parts).sum(0)


def likelihood_weights(probabilities: Sequence[Tensor], labels: Tensor) -> list[float]:
    """The weights >= 0 with sum 1 that minimise the log loss of the mixture on `labels` `[N]`, L(w) = -mean_i ln q_i,
    q_i = sum_m w_m p_m(y_i), with p_m(y_i) at least 1e-12.

    w_m <- w_m r_m, r_m = mean_i p_m(y_i) / q_i: expectation maximisation from equal weights, in float64. L is convex,
    so L(w) - min L <= max_m r_m - 1; the steps end when that is at most 1e-6 nats (or after 10 000).
    Source: Dempster et al. 1977; to weigh so is our choice.

    Raises DivergedError when a probability is not finite.
    """
    rows = torch.arange(len(labels))
    own = torch.stack([p.double()[rows, labels] for p in probabilities])
    if not bool(own.isfinite().all()):
        raise DivergedError("A model's probabilities on validation are not finite; leave it out.")
    own = own.clamp(min=LEAST)
    weights = own.new_full((len(own),), 1 / len(own))
    for _ in range(STEPS):
        ratios = (own / (weights @ own)).mean(1)
        if float(ratios.max()) <= 1 + CLOSE:
            break
        weights = weights * ratios
    found: list[float] = (weights / weights.sum()).tolist()
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
