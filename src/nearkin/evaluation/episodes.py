"""Few-shot episodes: draws images, fits a classifier for each episode, and averages. Uses no network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from nearkin.config import EpisodeOptions
from nearkin.data.sampling import keyed_rng
from nearkin.errors import DataError

Rows = NDArray[np.int64]
TOLERANCE = 1e-6  # largest entry of the gradient of the mean loss at convergence
ITERATIONS = 1000


class Episode(NamedTuple):
    """classes: `[ways]`. support: `[ways, shots]` and queries: `[ways, queries]`, rows of the split, none twice."""

    classes: Rows
    support: Rows
    queries: Rows


class Estimate(NamedTuple):
    """mean, std (with n - 1): of the episodes' accuracies, in [0, 1]. interval: half of the 95 % interval."""

    mean: float
    std: float
    interval: float


def eligible(labels: Rows, protocol: EpisodeOptions) -> Rows:
    """The classes with enough images for an episode, in rising order. labels: `[N]` class numbers.

    Raises DataError when they are fewer than the ways.
    """
    classes, counts = np.unique(labels, return_counts=True)
    found: Rows = classes[counts >= protocol.needed]
    if len(found) >= protocol.ways:
        return found
    problem = (
        f"A {protocol.ways}-way episode needs {protocol.ways} classes with {protocol.needed} images "
        f"({protocol.shots} labelled, {protocol.queries} queries), but {len(found)} of {len(classes)} have them"
    )
    advice, largest = list[str](), np.sort(counts)[::-1]
    if len(classes) >= protocol.ways:
        least = int(largest[protocol.ways - 1])
        if least > protocol.shots:
            advice.append(f"--queries {least - protocol.shots}")
        elif least > 1:
            advice.append("fewer --shots")
    if protocol.ways > 2 and sum(largest > 1) > 1:
        advice.append("fewer --ways")
    raise DataError(f"{problem}; use {' or '.join([*advice, 'other data'])}.")


def draw(labels: Rows, classes: Rows, protocol: EpisodeOptions) -> Iterator[Episode]:
    """The episodes over `classes`, each class with at least `protocol.needed` of the `labels` `[N]`.

    Ways, support and queries are drawn without replacement. Pure: the classes of episode e are the first of a
    permutation keyed by (seed, e), the images of class c the first of one keyed by (seed, e, c). So fewer ways
    give the same episodes without their last classes.
    """
    rows = {int(c): np.flatnonzero(labels == c) for c in classes}
    key = ("episode images", protocol.seed)
    for number in range(protocol.episodes):
        ways = keyed_rng("episode", protocol.seed, number).permutation(classes)[: protocol.ways]
        orders = [keyed_rng(*key, number, int(c)).permutation(rows[int(c)]) for c in ways]
        drawn = np.stack([order[: protocol.needed] for order in orders])
        yield Episode(ways, drawn[:, : protocol.shots], drawn[:, protocol.shots :])


def classify(
    support: NDArray[np.floating], labels: Rows, queries: NDArray[np.floating]
) -> NDArray[np.int64]:
    """The class `[m]` of each of the `queries` `[m, d]` after learning from `support` `[n, d]` with `labels` `[n]`.

    Multinomial logistic regression with C = 1: minimises sum_i CE_i(W, b) + |W|^2 / 2, the intercept b free of
    the penalty, by scikit-learn's L-BFGS in float64 (with two classes that is binary logistic regression).
    Source: few-shot protocol of SCHaNe's code, as in RFS (Tian et al. 2020, section 3).
    """
    # Pooled features share a large mean. The free intercept absorbs it, so W is the same without it, and the solver
    # needs half as many steps.
    centre = support.mean(0, dtype=np.float64)
    model = LogisticRegression(C=1.0, solver="lbfgs", tol=TOLERANCE, max_iter=ITERATIONS)
    predicted: NDArray[np.int64] = model.fit(support - centre, labels).predict(queries - centre)
    return predicted


def accuracy(
    episode: Episode, support: NDArray[np.floating], queries: NDArray[np.floating]
) -> float:
    """The share of the episode's queries that are classified correctly, in [0, 1].

    support: features `[N, copies, d]` that an image has in the support, queries: `[N, d]` that it has as a query.
    """
    ways, shots = episode.support.shape
    copies, dim = support.shape[1:]
    support_rows = support[episode.support].reshape(-1, dim)
    labels = np.repeat(np.arange(ways), shots * copies)
    query_rows = queries[episode.queries].reshape(-1, dim)
    truth = np.repeat(np.arange(ways), episode.queries.shape[1])
    return float((classify(support_rows, labels, query_rows) == truth).mean())


def estimate(accuracies: NDArray[np.float64]) -> Estimate:
    """Mean, standard deviation s (with n - 1) and 1.96 s / sqrt(n) of the accuracies `[n]`, n >= 2."""
    std = float(accuracies.std(ddof=1))
    return Estimate(float(accuracies.mean()), std, 1.96 * std / math.sqrt(len(accuracies)))
