"""Whether one model is better than another, from several training runs of each on the same test images.

Seeds and test images are both samples: another seed, and other images, would give another difference. Crossed random
effects count both (Dorfman, Berbaum and Metz 1992; degrees of freedom of Hillis 2007; floor of Q: ours):

d_si = score_B - score_A of seed s and image i, D its mean over n seeds and m images,
MS_S = m sum_s (d_s. - D)^2 / (n - 1),  MS_I = n sum_i (d_.i - D)^2 / (m - 1),
MS_E = sum_si (d_si - d_s. - d_.i + D)^2 / ((n - 1)(m - 1)),
Q = max(MS_S + MS_I - MS_E, MS_I),  SE^2 = Q / (n m),
df = max(n - 1, Q^2 / (MS_S^2 / (n - 1) + MS_I^2 / (m - 1) + MS_E^2 / ((n - 1)(m - 1)))).

Of few seeds MS_S is small by chance now and then; then SE is too small and df too large. So a t test over the seeds
alone, with SE_S^2 = MS_S / (n m) and n - 1 degrees of freedom, must agree: the wider interval of the two counts, and
the larger p value (docs/decisions/019-compare.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEAST_SEEDS = 3  # fewer give no verdict
LEAST_IMAGES = 8  # of fewer test images nothing can be said
ERROR = 0.05  # chance of a verdict "better" or "worse" where there is no difference, over all comparisons
MOST_SEEDS = 100  # that are worth naming


class Effect(NamedTuple):
    """The mean difference of two models, and the three mean squares that say how certain it is.

    difference: D. seeds, images: n and m. between_seeds, between_images, rest: MS_S, MS_I and MS_E. largest: weight of
    an image at most, where their mean is 1.
    """

    difference: float
    seeds: int
    images: int
    between_seeds: float
    between_images: float
    rest: float
    largest: float = 1.0

    @property
    def _spread(self) -> float:
        return max(self.between_seeds + self.between_images - self.rest, self.between_images)

    @property
    def error(self) -> float:
        """The standard error SE of the difference."""
        return math.sqrt(self._spread / (self.seeds * self.images))

    @property
    def error_of_seeds(self) -> float:
        """SE_S, for other seeds with the same test images."""
        return math.sqrt(self.between_seeds / (self.seeds * self.images))

    @property
    def freedom(self) -> float:
        """The degrees of freedom df of `error`."""
        n, m = self.seeds - 1, self.images - 1
        below = self.between_seeds**2 / n + self.between_images**2 / m + self.rest**2 / (n * m)
        return max(n, self._spread**2 / below) if below > 0 else n

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        half = self._half(0.05)
        return self.difference - half, self.difference + half

    @property
    def p_value(self) -> float:
        """The two-sided p value of D = 0; 1 where all differences are 0."""
        size = abs(self.difference)
        if size == 0:
            return 1.0
        return max(
            float(2 * stats.t.sf(size / error, freedom)) if error > 0 else 0.0
            for error, freedom in self._errors()
        )

    def is_within(self, same: float) -> bool:
        """Whether D and its 90 % interval are within `same` on both sides of 0.

        Where the models differ on few images, or on none, SE is too small: other images would differ. So one image for,
        and one against, are added to it: 2 (w / m)^2 to its square, w the largest weight (Agresti and Min 2005 add as
        much to the interval of one seed).
        """
        return abs(self.difference) + self._half(0.1, self._two_images) <= same

    def _errors(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Standard errors and their degrees of freedom: of seeds and images, and of seeds alone."""
        return (self.error, self.freedom), (self.error_of_seeds, self.seeds - 1)

    def _half(self, level: float, more: float = 0.0) -> float:
        """Half the width of the interval of confidence 1 - `level`; `more`: an error to add to both."""
        return max(
            float(stats.t.ppf(1 - level / 2, freedom)) * math.hypot(error, more)
            for error, freedom in self._errors()
        )

    @property
    def _two_images(self) -> float:
        return math.sqrt(2) * self.largest / self.images

    def seeds_to_decide(self, error: float = ERROR, same: float = 0.0) -> int | None:
        """The least number of seeds, above `seeds`, with which a difference as large as D would be significant at
        `error`, or within `same` by `is_within`; MOST_SEEDS + 1 more where more than MOST_SEEDS are needed. None where
        no number of seeds is enough, since the test images are too few.

        The variances of seeds, images and the rest are those found now: a rough estimate.
        """
        seed = max(self.between_seeds - self.rest, 0) / self.images
        image = max(self.between_images - self.rest, 0) / self.seeds
        least, size = math.sqrt(image / self.images), abs(self.difference)
        # With seeds without end the images alone are uncertain, and their degrees of freedom remain.
        only_images = stats.t(self.images - 1)
        differs = float(only_images.ppf(1 - error / 2)) * least < size
        alike = size + float(only_images.ppf(0.95)) * math.hypot(least, self._two_images) < same
        if not (differs or alike):
            return None
        most = self.seeds + MOST_SEEDS
        for seeds in range(self.seeds + 1, most + 1):
            planned = self._replace(
                seeds=seeds,
                between_seeds=self.rest + self.images * seed,
                between_images=self.rest + seeds * image,
            )
            if differs and planned._half(error) < size:
                return seeds
            if alike and planned.is_within(same):
                return seeds
        return most + 1


def effect(first: NDArray[np.float64], second: NDArray[np.float64], largest: float = 1.0) -> Effect:
    """The effect of `second` over `first`: scores `[n, m]` of n seeds on m images, more is better. largest: see
    `Effect`.

    Raises ValueError for other shapes, less than two seeds or less than two images.
    """
    if first.shape != second.shape or first.ndim != 2 or min(first.shape) < 2:
        raise ValueError(f"Two tables of at least 2 x 2 scores, not {first.shape}, {second.shape}.")
    d = second - first
    n, m = d.shape
    mean, seeds, images = d.mean(), d.mean(1, keepdims=True), d.mean(0, keepdims=True)
    rest = np.square(d - seeds - images + mean).sum() / ((n - 1) * (m - 1))
    between_seeds = m * np.square(seeds - mean).sum() / (n - 1)
    between_images = n * np.square(images - mean).sum() / (m - 1)
    return Effect(
        float(mean), n, m, float(between_seeds), float(between_images), float(rest), largest
    )


def balancing(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights `[m]` with which a mean over images is a mean over classes: m / (K m_class), K classes that occur."""
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = len(labels) / (len(counts) * counts[places])
    return weights


class Adjusted(NamedTuple):
    """A p value among several. p: adjusted. tests: by how many it was multiplied."""

    p: float
    tests: int


def holm(p_values: Mapping[str, float]) -> dict[str, Adjusted]:
    """P values adjusted for their number (Holm 1979): up to `ERROR`, one is significant among all of them."""
    adjusted, least = dict[str, Adjusted](), 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        tests = len(p_values) - rank
        least = max(least, min(1.0, tests * p_values[name]))
        adjusted[name] = Adjusted(least, tests)
    return adjusted


def verdict(found: Effect, adjusted: Adjusted, *, same: float, within: str) -> str:
    """What the numbers allow to say, in words.

    adjusted: by `holm`. same: differences up to this do not matter; within: that in words, such as "0.5 points".
    """
    if found.seeds < LEAST_SEEDS:
        return f"no verdict: {LEAST_SEEDS} seeds are the least"
    if adjusted.p <= ERROR and found.difference != 0:
        return "better" if found.difference > 0 else "worse"
    if found.is_within(same):
        return f"the same within {within}"
    needed = found.seeds_to_decide(ERROR / adjusted.tests, same)
    if needed is None:
        return "undecided: more seeds cannot decide, only more test images can"
    more = needed - found.seeds
    if more > MOST_SEEDS:
        return f"undecided: more than {MOST_SEEDS} more seeds would decide"
    return f"undecided: about {more} more {'seed' if more == 1 else 'seeds'} would decide"
