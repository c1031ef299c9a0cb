"""Before a run starts: how many anchors of a contrast will find no other image of their class in the batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from nearkin.data.samplers import Draws, Sampler

TOO_MANY = 0.05


def expected_share(labels: NDArray[np.int64], batch_size: int) -> float:
    """The expected share of anchors without a positive where a batch is drawn without replacement, in [0, 1].

    mean over images i of C(N - n_i, B - 1) / C(N - 1, B - 1): none of the n_i - 1 others of i's class is among the
    B - 1 other places of the batch. The logarithm of the quotient is taken by lgamma. Exact in expectation.
    """
    counts = np.bincount(labels).astype(np.float64)
    counts = counts[counts > 0]
    total, others = counts.sum(), batch_size - 1
    possible = total - counts >= others
    strangers = np.where(possible, total - counts, others)
    log_none = _log_choose(strangers, others) - _log_choose(total - 1, others)
    return float((counts / total * np.where(possible, np.exp(log_none), 0.0)).sum())


def counted_share(draws: Draws, labels: NDArray[np.int64], batch_size: int) -> float:
    """The share of anchors without a positive in the whole batches of one epoch, counted, in [0, 1]."""
    steps = len(labels) // batch_size
    drawn = labels[draws.rows[: steps * batch_size]].reshape(steps, batch_size)
    lone = 0
    for batch in drawn:
        lone += int((np.bincount(batch) == 1).sum())
    return lone / drawn.size


def warning(share: float, batch_size: int, sampler: Sampler) -> str | None:
    """What to say to a person, if anything."""
    if share <= TOO_MANY:
        return None
    change = "another --per-class" if sampler == "balanced" else "--sampler balanced"
    return (
        f"About {100 * share:.0f} % of the anchors will find no other image of their class in a batch of "
        f"{batch_size} and teach the contrast nothing. Use {change}, a larger --batch-size, or "
        "--objective.views 2."
    )


def _log_choose(n: NDArray[np.float64] | float, k: int) -> NDArray[np.float64]:
    result: NDArray[np.float64] = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    return result
