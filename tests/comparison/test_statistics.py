"""Crossed random effects: a case by hand, an oracle written with loops, and simulated comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nearkin.comparison.statistics import Adjusted, balancing, effect, holm, verdict

# Two seeds, three images. By hand: D = 1/3; seed means 2/3 and 0; image means 1, 0, 0.
# MS_S = 3 (1/9 + 1/9) / 1 = 2/3.  MS_I = 2 (4/9 + 1/9 + 1/9) / 2 = 2/3.
# Residuals: seed 1: 1 - 2/3 - 1 + 1/3 = -1/3, 1 - 2/3 - 0 + 1/3 = 2/3, 0 - 2/3 - 0 + 1/3 = -1/3; seed 2 the opposite.
# MS_E = 2 (1/9 + 4/9 + 1/9) / (1 * 2) = 2/3.  Q = 2/3, SE^2 = 2/3 / 6 = 1/9.
FIRST = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
SECOND = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])


def test_a_case_computed_by_hand():
    found = effect(FIRST, SECOND)
    squares = (found.between_seeds, found.between_images, found.rest)
    assert found.difference == pytest.approx(1 / 3)
    assert squares == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found.error == pytest.approx(1 / 3)
    # df = max(1, (4/9) / ((4/9) / 1 + (4/9) / 2 + (4/9) / 2)) = max(1, 1/2)
    assert found.freedom == 1
    half = stats.t.ppf(0.975, 1) / 3
    assert found.interval() == pytest.approx((1 / 3 - half, 1 / 3 + half))
    assert found.p_value == pytest.approx(2 * stats.t.sf(1.0, 1))


def oracle(d):
    """The equations of the module, term by term."""
    n, m = len(d), len(d[0])
    mean = sum(sum(row) for row in d) / (n * m)
    seed = [sum(row) / m for row in d]
    image = [sum(d[s][i] for s in range(n)) / n for i in range(m)]
    ms_s = m * sum((x - mean) ** 2 for x in seed) / (n - 1)
    ms_i = n * sum((x - mean) ** 2 for x in image) / (m - 1)
    ms_e = sum((d[s][i] - seed[s] - image[i] + mean) ** 2 for s in range(n) for i in range(m)) / (
        (n - 1) * (m - 1)
    )
    q = max(ms_s + ms_i - ms_e, ms_i)
    below = ms_s**2 / (n - 1) + ms_i**2 / (m - 1) + ms_e**2 / ((n - 1) * (m - 1))
    df = max(n - 1, q**2 / below)
    spread = math.sqrt(sum((x - mean) ** 2 for x in seed) / (n - 1))
    half = max(
        stats.t.ppf(0.975, df) * math.sqrt(q / (n * m)),
        stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n),
    )
    return mean, mean - half, mean + half, df


@pytest.mark.parametrize("shape", [(2, 5), (3, 40), (7, 11)])
def test_the_interval_is_that_of_an_oracle_with_loops(shape):
    rng = np.random.default_rng(sum(shape))
    first, second = (rng.integers(0, 2, shape).astype(float) for _ in range(2))
    found = effect(first, second)
    mean, low, high, df = oracle((second - first).tolist())
    assert (found.difference, *found.interval()) == pytest.approx((mean, low, high))
    assert found.freedom == pytest.approx(df)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1)])
def test_one_seed_or_one_image_is_refused(shape):
    with pytest.raises(ValueError, match="2 x 2"):
        effect(np.zeros(shape), np.zeros(shape))


def simulated(rng, n, m, shift, own=0.2, seed=0.05):
    """Correct answers `[2, n, m]` of two models, of which the second knows more by `shift`.

    own: how much each model favours images of its own, whatever the seed. seed: how much its strength depends on it.
    """
    image, favour = rng.normal(1.0, 1.5, m), rng.normal(0, own, (2, 1, m))
    strength = rng.normal(0, seed, (2, n, 1)) + np.array([0, shift])[:, None, None]
    return (image + favour + strength + rng.logistic(0, 0.5, (2, n, m)) > 0).astype(float)


def true_difference(shift):
    """In points, from one seed and one image for each of many pairs of models."""
    rng, size = np.random.default_rng(7), 2_000_000
    known = rng.normal(1.0, math.sqrt(1.5**2 + 0.2**2 + 0.05**2), size)
    known += rng.logistic(0, 0.5, size)
    return 100 * float(((known + shift > 0) & (known <= 0)).mean())


@pytest.mark.parametrize(
    ("n", "m", "own", "seed"),
    [
        (3, 372, 0.8, 0.05),
        (3, 372, 0.2, 0.4),
        (5, 372, 0.2, 0.05),
        (5, 2000, 0.2, 0.15),
        (10, 2000, 0.8, 0.0),
    ],
)
def test_the_interval_covers_and_better_is_rarely_wrong(n, m, own, seed, capsys):
    """With no difference: coverage of 93 to 99 %, and at most 5 % false "better"."""
    rng, trials = np.random.default_rng(10 * n + m), 500
    covered = better = by_seeds = by_images = 0
    for _ in range(trials):
        scores = simulated(rng, n, m, 0.0, own, seed)
        found = effect(*scores)
        low, high = found.interval()
        covered += low <= 0 <= high
        better += verdict(found, alone(found), same=0.005, within="") == "better"
        by_seeds += not significant(np.subtract(*scores).mean(1))
        by_images += not significant(np.subtract(*scores).mean(0))
    with capsys.disabled():
        print(
            f"\n{n} seeds, {m} images: {covered / trials:.1%} of the intervals contain 0 (t test over seeds "
            f"{by_seeds / trials:.1%}, over images {by_images / trials:.1%}), false better {better / trials:.1%}"
        )
    assert 0.93 <= covered / trials <= 0.99
    assert better / trials <= 0.05


def test_the_seeds_alone_must_agree():
    """Three seeds that chance made alike, on images that hardly differ: crossed random effects alone would be sure."""
    rng = np.random.default_rng(5)
    second = np.zeros((3, 1000))
    second[:, :10] = 1.0  # each seed is right on the same ten images
    second[0, 10:12] = 1.0
    first = (rng.random((3, 1000)) < 0.004).astype(float)
    found = effect(first, second)
    by_seed = (second - first).mean(1)
    assert found.p_value >= stats.ttest_1samp(by_seed, 0).pvalue
    assert found._replace(between_seeds=0.0).p_value < found.p_value


@pytest.mark.parametrize(
    ("entries", "n", "m", "seed"), [(3, 5, 372, 0.05), (8, 3, 1000, 0.1), (8, 3, 1000, 0.3)]
)
def test_better_is_rarely_wrong_in_a_whole_table(entries, n, m, seed, capsys):
    """Of entries that share a baseline and are no better, all tested at once by Holm. seed: as of `simulated`."""
    rng, trials, wrong = np.random.default_rng(3), 400, 0
    for _ in range(trials):
        image = rng.normal(1.0, 1.5, m)
        models = [
            (
                image
                + rng.normal(0, 0.4, (1, m))
                + rng.normal(0, seed, (n, 1))
                + rng.logistic(0, 0.5, (n, m))
                > 0
            ).astype(float)
            for _ in range(entries + 1)
        ]
        found = [effect(models[0], other) for other in models[1:]]
        adjusted = holm({str(place): each.p_value for place, each in enumerate(found)})
        words = [
            verdict(each, adjusted[str(place)], same=0.005, within="")
            for place, each in enumerate(found)
        ]
        wrong += any(each in ("better", "worse") for each in words)
    with capsys.disabled():
        print(
            f"\n{entries} entries, {n} seeds, {m} images, seeds differ by {seed}: {wrong / trials:.1%} of the tables "
            "call one better or worse"
        )
    # Where the seeds differ much, the rate is the nominal 5 %: two standard errors of the simulation are allowed.
    assert wrong / trials <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


def alone(found):
    """The p value where nothing else is tested."""
    return Adjusted(found.p_value, 1)


def significant(differences):
    """A t test of the mean, which is what the interval is compared with."""
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return abs(differences.mean()) > error * stats.t.ppf(0.975, len(differences) - 1)


@pytest.mark.parametrize(("n", "m"), [(3, 372), (5, 2000), (10, 2000)])
def test_power(n, m, capsys):
    """Of a true difference of 1 and of 2 points; more is found of the larger one."""
    rng, powers = np.random.default_rng(n * m), []
    for points, shift in ((1, 0.05), (2, 0.1)):
        truth = true_difference(shift)
        assert truth == pytest.approx(points, abs=0.2)
        found = [effect(*simulated(rng, n, m, shift)) for _ in range(200)]
        powers.append(np.mean([e.p_value <= 0.05 and e.difference > 0 for e in found]))
        with capsys.disabled():
            print(f"\n{n} seeds, {m} images: power {powers[-1]:.0%} at {truth:.2f} points")
    assert powers[1] > powers[0]


def test_seeds_to_decide_are_the_least_that_are_enough():
    """By the variances of seeds (2e-5), images (0.02) and the rest (0.1), with the equations written out."""
    n, m, difference = 4, 1000, 0.012
    found = effect(FIRST, SECOND)._replace(
        difference=difference, seeds=n, images=m, between_seeds=0.1 + m * 2e-5
    )
    found = found._replace(between_images=0.1 + n * 0.02, rest=0.1)
    assert found.p_value > 0.05

    def enough(seeds):
        ms_s, ms_i, ms_e = 0.1 + m * 2e-5, 0.1 + seeds * 0.02, 0.1
        q = ms_s + ms_i - ms_e
        below = ms_s**2 / (seeds - 1) + ms_i**2 / (m - 1) + ms_e**2 / ((seeds - 1) * (m - 1))
        both = stats.t.ppf(0.975, max(seeds - 1, q**2 / below)) * math.sqrt(q / (seeds * m))
        alone = stats.t.ppf(0.975, seeds - 1) * math.sqrt(ms_s / (seeds * m))
        return max(both, alone) < difference

    needed = next(seeds for seeds in range(n + 1, 1000) if enough(seeds))
    assert found.seeds_to_decide() == needed
    assert (
        found._replace(difference=0.005).seeds_to_decide() is None
    )  # 1.96 sqrt(0.02 / 1000) = 0.0088


def test_more_comparisons_need_more_seeds():
    """Of the same effect: alone, and as the smallest of five p values."""
    found = effect(FIRST, SECOND)._replace(
        difference=0.012, seeds=4, images=1000, between_seeds=0.12, between_images=0.18, rest=0.1
    )
    needed = {tests: found.seeds_to_decide(0.05 / tests) for tests in (1, 5)}
    assert needed[1] < needed[5]
    for tests, seeds in needed.items():
        text = verdict(found, Adjusted(min(1, tests * found.p_value), tests), same=0.001, within="")
        assert text == f"undecided: about {seeds - 4} more seeds would decide"


def test_few_images_have_few_degrees_of_freedom_with_any_number_of_seeds():
    """Eight images: t has 7 degrees of freedom and its quantile is 2.36, not 1.96."""
    error = math.sqrt(0.08 / 8)  # 0.1 of the mean, by the images alone
    found = effect(FIRST, SECOND)._replace(
        seeds=5, images=8, between_seeds=0.1, between_images=0.1 + 5 * 0.08, rest=0.1
    )
    assert found._replace(difference=2.3 * error).seeds_to_decide() is None
    needed = found._replace(difference=2.6 * error).seeds_to_decide()
    assert needed is not None
    assert needed > 5


def test_balancing_makes_a_mean_over_classes():
    labels = np.array([0, 0, 0, 2])
    scores = np.array([1.0, 1.0, 0.0, 0.0])
    assert (scores * balancing(labels)).mean() == pytest.approx((2 / 3 + 0) / 2)


def test_holm_adjusts_as_in_a_worked_example():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1, each at least the one before.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert {name: each.p for name, each in found.items()} == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert {name: each.tests for name, each in found.items()} == {"a": 3, "b": 1, "c": 2, "d": 4}
    assert holm({"a": 0.6, "b": 0.9}) == {"a": (1.0, 2), "b": (1.0, 1)}
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("difference", "spread", "seeds", "words"),
    [
        (0.02, 1e-4, 5, "better"),
        (-0.02, 1e-4, 5, "worse"),
        (0.0004, 1e-3, 5, "the same within 0.5 points"),
        (0.02, 4.0, 5, "undecided: about"),
        (0.02, 1e-4, 2, "no verdict: 3 seeds are the least"),
    ],
)
def test_verdicts(difference, spread, seeds, words):
    found = effect(FIRST, SECOND)._replace(
        difference=difference,
        seeds=seeds,
        images=1000,
        between_seeds=spread,
        between_images=spread,
        rest=spread,
    )
    assert verdict(found, alone(found), same=0.005, within="0.5 points").startswith(words)


def test_more_seeds_cannot_decide_what_images_make_uncertain():
    found = effect(FIRST, SECOND)._replace(
        difference=0.01, seeds=5, images=100, between_seeds=0.1, between_images=2.0, rest=0.1
    )
    text = verdict(found, alone(found), same=0.005, within="0.5 points")
    assert text == "undecided: more seeds cannot decide, only more test images can"


def test_seeds_that_would_show_that_two_are_the_same_are_counted():
    """By the variances of seeds (2e-5), images (0.002) and the rest (0.1), and a difference of a tenth of a point."""
    m, difference, same = 2000, 0.001, 0.005

    def found(seeds):
        return effect(FIRST, SECOND)._replace(
            difference=difference,
            seeds=seeds,
            images=m,
            between_seeds=0.1 + m * 2e-5,
            between_images=0.1 + seeds * 0.002,
            rest=0.1,
        )

    def inside(seeds):
        ms_s, ms_i, ms_e = 0.1 + m * 2e-5, 0.1 + seeds * 0.002, 0.1
        q = ms_s + ms_i - ms_e
        below = ms_s**2 / (seeds - 1) + ms_i**2 / (m - 1) + ms_e**2 / ((seeds - 1) * (m - 1))
        both = math.sqrt(q / (seeds * m) + 2 / m**2)
        alone = math.sqrt(ms_s / (seeds * m) + 2 / m**2)
        half = stats.t.ppf(0.95, max(seeds - 1, q**2 / below)) * both
        return difference + max(half, stats.t.ppf(0.95, seeds - 1) * alone) <= same

    needed = next(seeds for seeds in range(4, 1000) if inside(seeds))
    text = verdict(found(3), alone(found(3)), same=same, within="0.5 points")
    assert text == f"undecided: about {needed - 3} more seeds would decide"
    enough = found(needed)
    assert verdict(enough, alone(enough), same=same, within="x") == "the same within x"


def test_equal_predictions_are_the_same():
    scores = np.tile(FIRST, (2, 300))
    found = effect(scores, scores)
    assert found.p_value == 1.0
    assert (
        verdict(found, alone(found), same=0.005, within="0.5 points")
        == "the same within 0.5 points"
    )
    few = found._replace(images=200)  # one image is half a point
    assert verdict(few, alone(few), same=0.005, within="").startswith(
        "undecided: more seeds cannot"
    )
    # One class of two images of ten: one of them is 5 points of the balanced accuracy.
    rare = effect(scores, scores, largest=900 / (10 * 2))
    assert verdict(rare, alone(rare), same=0.005, within="").startswith("undecided")


@pytest.mark.parametrize("images", [200, 372, 600, 1000, 2000])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_same_is_rarely_said_of_half_a_point(images, noise, capsys):
    """The models differ on few images, at each seed on the same ones, and the true difference is 0.5 points: a nominal
    5 % say "the same"."""
    rng, trials, wrong = np.random.default_rng(images), 400, 0
    for _ in range(trials):
        known = np.tile(rng.random(images) < 0.005, (5, 1)).astype(float)
        draws = rng.random((2, 5, images)) < noise / 2
        found = effect(draws[0].astype(float), known + draws[1])
        wrong += found.is_within(0.005)
    with capsys.disabled():
        print(f"\n{images} images, noise {noise:.0%}: {wrong / trials:.1%} called the same")
    assert wrong / trials <= 0.08
