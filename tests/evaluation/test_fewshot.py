"""Few-shot episodes: what is drawn, the classifier against Newton's method, the interval, the features."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.pictures import write_classes

from nearkin.cli import run
from nearkin.config import EpisodeOptions
from nearkin.data.dataset import load_dataset
from nearkin.data.sampling import sample_seed
from nearkin.data.transforms import RandomPaddedCrop, eval_transform
from nearkin.errors import DataError, ModelError
from nearkin.evaluation import episodes
from nearkin.evaluation.episodes import Episode, accuracy, classify, draw, eligible, estimate
from nearkin.evaluation.features import Features, extract, play
from nearkin.evaluation.model import load_bundle

COUNTS = (20, 4, 9, 30, 7, 8, 12)  # images of classes 0 to 6


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))


def drawn(labels, **options):
    protocol = EpisodeOptions(**{"ways": 3, "shots": 2, "queries": 5, "episodes": 200} | options)
    return list(draw(labels, eligible(labels, protocol), protocol))


def sound(episode, labels):
    """The definition: distinct classes, each image of its class, none twice."""
    rows = np.concatenate([episode.support, episode.queries], axis=1)
    classes = episode.classes
    return (
        len(set(classes.tolist())) == len(classes)
        and len(np.unique(rows)) == rows.size
        and bool((labels[rows] == classes[:, None]).all())
    )


def test_an_episode_has_its_classes_and_no_image_twice(labels):
    for episode in drawn(labels):
        assert episode.support.shape == (3, 2)
        assert episode.queries.shape == (3, 5)
        assert sound(episode, labels)
        assert not set(episode.classes.tolist()) & {1}  # it has 4 images, 7 are needed


def test_a_leak_and_a_foreign_image_would_be_found(labels):
    good = drawn(labels)[0]
    leak = good.queries.copy()
    leak[0, 0] = good.support[0, 0]
    assert not sound(good._replace(queries=leak), labels)
    assert not sound(good._replace(support=good.support[[1, 0, 2]]), labels)


def test_every_class_and_every_image_is_drawn_equally_often(labels):
    many = drawn(labels, episodes=3000)
    classes = Counter(c for e in many for c in e.classes.tolist())
    assert set(classes) == {0, 2, 3, 4, 5, 6}
    for count in classes.values():  # binomial: n = 3000, p = 1/2
        assert abs(count - 1500) < 4 * math.sqrt(3000 / 4)
    support = Counter(r for e in many for r in e.support.ravel().tolist())
    for row in np.flatnonzero(labels == 0):  # p = 1/2 * 2/20
        assert abs(support[row] - 150) < 5 * math.sqrt(150)
    queries = Counter(r for e in many for r in e.queries.ravel().tolist())
    for row in np.flatnonzero(labels == 4):  # p = 1/2 * 5/7
        assert abs(queries[row] - 3000 * 5 / 14) < 5 * math.sqrt(3000 * 5 / 14 * 9 / 14)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_seed_decides(labels):
    first, again, other = (drawn(labels, seed=seed) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))
    assert not any(same(a, b) for a, b in pairwise(first))
    few = drawn(labels, episodes=7)
    assert all(same(a, b) for a, b in zip(few, first[:7], strict=True))


def test_fewer_ways_are_the_same_episodes_without_their_last_classes(labels):
    for three, five in zip(drawn(labels, ways=3), drawn(labels, ways=5), strict=True):
        assert same(three, Episode(*(part[:3] for part in five)))


def test_too_few_classes_are_an_error_whose_advice_helps(labels):
    def ask(**options):
        return eligible(labels, EpisodeOptions(**{"ways": 5, "shots": 2} | options))

    with pytest.raises(DataError, match=r"5 classes with 17 images .* 2 of 7 .* --queries 6 or"):
        ask(queries=15)
    assert ask(queries=6).tolist() == [0, 2, 3, 5, 6]
    with pytest.raises(DataError):
        ask(queries=7)
    with pytest.raises(DataError, match=r"use fewer --shots or fewer --ways or other data"):
        ask(shots=8)
    with pytest.raises(DataError, match=r"use fewer --ways or other data"):
        ask(ways=8, queries=1)
    smallest = {"ways": 2, "shots": 1, "queries": 1}
    with pytest.raises(DataError, match=r"have them; use other data\.$"):
        eligible(np.arange(6), EpisodeOptions(**smallest))


def newton(x, y, ways, strength=1.0, steps=60):
    """The minimum of sum CE + |W|^2 / (2 C) by damped Newton steps in float64; b free. Weights `[d + 1, ways]`."""
    x = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.diag([1 / strength] * (x.shape[1] - 1) + [0.0])
    onehot = np.eye(ways)[y]

    def value(w):
        z = x @ w
        top = z.max(1, keepdims=True)
        lse = np.log(np.exp(z - top).sum(1)) + top[:, 0]
        return (lse - z[np.arange(len(y)), y]).sum() + 0.5 * (w * (ridge @ w)).sum()

    w = np.zeros((x.shape[1], ways))
    for _ in range(steps):
        z = x @ w
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - onehot) + ridge @ w
        outer = np.einsum("nk,kl->nkl", p, np.eye(ways)) - p[:, :, None] * p[:, None]
        hessian = np.einsum("nkl,ni,nj->ikjl", outer, x, x)
        for k in range(ways):
            hessian[:, k, :, k] += ridge
        size = w.size
        # b is defined up to a constant: the least-squares step takes the shortest.
        step = np.linalg.lstsq(hessian.reshape(size, size), gradient.ravel(), rcond=1e-12)[0]
        step, rate = step.reshape(w.shape), 1.0
        while value(w - rate * step) > value(w) and rate > 1e-6:
            rate /= 2
        w = w - rate * step
    assert np.abs(gradient).max() < 1e-8
    return w


def hard_episode(kind, ways, seed):
    rng = np.random.default_rng(seed)
    dim, each = 6, 4
    centres = rng.normal(size=(ways, dim))
    x = np.repeat(centres, each, 0) + 0.8 * rng.normal(size=(ways * each, dim))
    y = np.repeat(np.arange(ways), each)
    if kind == "duplicate":  # every copy of an image alike, and one image in two classes
        x = np.repeat(x[::each], each, 0)
        x[each] = x[0]
    if kind == "collinear":  # six columns of rank two
        x = x[:, :2] @ rng.normal(size=(2, dim))
    if kind == "uneven":
        keep = np.r_[0:each, each : len(x) : each]
        x, y = x[keep], y[keep]
    queries = rng.normal(size=(4000, dim))
    return x, y, queries


@pytest.mark.parametrize("kind", ["random", "duplicate", "collinear", "uneven"])
@pytest.mark.parametrize("ways", [3, 5])
def test_the_classifier_is_the_minimum_of_its_objective(kind, ways):
    for seed in range(3):
        x, y, queries = hard_episode(kind, ways, seed)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        x = x.astype(np.float32)
        wide = np.hstack([queries, np.ones((len(queries), 1))])

        def scores(strength, x=x, y=y, wide=wide):
            return wide @ newton(x.astype(np.float64), y, ways, strength)

        found, expected = classify(x, y, queries), scores(1.0)
        two = np.sort(expected, axis=1)[:, -2:]
        clear = two[:, 1] - two[:, 0] > 1e-4
        assert clear.mean() > 0.99
        assert np.array_equal(found[clear], expected.argmax(1)[clear])
        if kind == "uneven":  # another C moves the border: the comparison sees it
            assert not np.array_equal(found[clear], scores(0.1).argmax(1)[clear])


def test_two_ways_are_binary_logistic_regression():
    x, y, queries = hard_episode("random", 2, 0)
    rows = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.diag([1.0] * x.shape[1] + [0.0])
    w = np.zeros(rows.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-rows @ w))
        hessian = rows.T @ (rows * (p * (1 - p))[:, None]) + ridge
        w -= np.linalg.solve(hessian, rows.T @ (p - y) + ridge @ w)
    margin = np.hstack([queries, np.ones((len(queries), 1))]) @ w
    clear = np.abs(margin) > 1e-4
    assert np.array_equal(classify(x, y, queries)[clear], (margin > 0)[clear])


def made(kind, copies=2, classes=6, each=12, seed=0):
    """Features of `classes` x `each` images, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    if kind == "separable":
        plain = np.eye(classes)[labels] + 0.01 * rng.normal(size=(len(labels), classes))
    else:
        plain = rng.normal(size=(len(labels), 40))
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    plain = plain.astype(np.float32)
    return Features(plain, np.repeat(plain[:, None], copies, 1)), labels


def played(features, labels, **options):
    protocol = EpisodeOptions(**{"ways": 4, "shots": 2, "queries": 6, "episodes": 150} | options)
    return play(features, labels, eligible(labels, protocol), protocol)


def test_separable_features_give_everything():
    assert (played(*made("separable")) == 1).all()
    assert (played(*made("separable"), copies=0, shots=1) == 1).all()


def test_random_features_give_chance_and_a_leak_would_show():
    features, labels = made("random", each=80)
    found = estimate(played(features, labels, queries=15))
    assert abs(found.mean - 1 / 4) < 1.5 * found.interval < 0.02
    protocol = EpisodeOptions(ways=4, shots=2, queries=2, episodes=20)
    for episode in draw(labels, np.unique(labels), protocol):
        leaky = episode._replace(queries=episode.support)
        assert accuracy(leaky, features.copies, features.plain) == 1


def test_the_support_is_augmented_and_the_queries_are_not():
    features, labels = made("separable")
    shifted = np.roll(features.plain, 1, axis=1)  # every query looks like the next class
    assert played(Features(shifted, features.copies), labels).max() < 1
    assert played(Features(shifted, features.copies), labels, ways=6).max() == 0
    assert played(Features(shifted, shifted[:, None]), labels).min() == 1


def test_each_copy_counts():
    """Only the last copy of an image tells its class; the first is the same for all."""
    features, labels = made("separable")
    empty = np.zeros_like(features.plain)
    assert played(Features(features.plain, np.stack([empty, features.plain], 1)), labels).min() == 1
    assert played(Features(features.plain, empty[:, None]), labels).max() < 0.5


ONE_THREAD = """
import numpy as np
from threadpoolctl import threadpool_info
from nearkin.evaluation import features
from nearkin.evaluation.features import Features
from nearkin.config import EpisodeOptions

solve, inside = features.accuracy, set()

def spied(*parts):
    found = solve(*parts)
    inside.update(pool["num_threads"] for pool in threadpool_info())
    return found

features.accuracy = spied
rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
labels = np.repeat(np.arange(3), 3)
protocol = EpisodeOptions(ways=3, queries=2, episodes=2)
features.play(Features(rows, rows[:, None]), labels, np.arange(3), protocol)
print(inside, max(pool["num_threads"] for pool in threadpool_info()))
"""


def test_one_thread_solves_and_the_others_come_back():
    """In a fresh process: a library that is loaded after the limit is set would not be held to it."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    done = subprocess.run(
        [sys.executable, "-c", ONE_THREAD], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["{1}", "2"]


def test_the_interval():
    values = [0.5, 0.75, 1.0, 0.25, 0.5]
    found = estimate(np.array(values))
    assert found.mean == pytest.approx(statistics.mean(values), rel=1e-12)
    assert found.std == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert found.interval == pytest.approx(1.96 * statistics.stdev(values) / 5**0.5, rel=1e-12)
    assert found.interval != pytest.approx(1.96 * statistics.pstdev(values) / 5**0.5, rel=1e-2)


def test_the_interval_covers_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    tries = [estimate(rng.binomial(75, 0.6, 400) / 75) for _ in range(1000)]
    covered = sum(abs(e.mean - 0.6) <= e.interval for e in tries)
    assert 930 <= covered <= 970


# The features.


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A network of folders that was never trained, and other images."""
    root = tmp_path_factory.mktemp("features")
    write_classes(root / "base", ("a", "b"), each=6)
    write_classes(root / "new", ("x", "y", "z"), each=5)
    words = ["train", str(root / "base"), "--epochs", "0", "--model", "test_resnet"]
    words += ["--image-size", "16", "--threads", "1", "--quiet", "--batch-size", "4"]
    assert run([*words, "--out", str(root / "run")]) == 0
    bundle = load_bundle(root / "run", torch.device("cpu"))
    return bundle, load_dataset(str(root / "new"), val_split=0).splits["train"]


def taken(untrained, rows=range(15), **options):
    bundle, split = untrained
    given = {"copies": 3, "flip": True, "seed": 0, "workers": 0} | options
    return extract(bundle, split, list(rows), **given)


def pooled(bundle, image):
    """By hand: pixels, the backbone alone, unit length."""
    network = bundle.network
    with torch.no_grad():
        feature = network.backbone((image[None] / 255 - network.mean) / network.std)[0]
    return (feature / feature.square().sum().sqrt()).numpy()


def test_features_are_those_of_the_backbone(untrained):
    bundle, split = untrained
    found = taken(untrained)
    assert found.plain.shape == (15, bundle.network.dim)
    assert found.copies.shape == (15, 3, bundle.network.dim)
    assert found.plain.dtype == found.copies.dtype == np.float32
    transform = eval_transform(bundle.description.transform)
    state = torch.get_rng_state()
    for row in (0, 7, 14):
        image = split.images.read(row)
        assert np.allclose(found.plain[row], pooled(bundle, transform(image)), atol=1e-5)
        for copy in range(3):
            torch.manual_seed(sample_seed(0, 0, row, 0, copy))
            view = RandomPaddedCrop(16, 2)(image)
            view = view.flip(-1) if torch.rand(()) < 0.5 else view
            assert np.allclose(found.copies[row, copy], pooled(bundle, view), atol=1e-5)
            assert not np.allclose(found.copies[row, copy], found.plain[row], atol=1e-4)
    torch.set_rng_state(state)


def test_features_depend_on_the_image_and_the_seed_alone(untrained, monkeypatch):
    found = taken(untrained)
    workers = taken(untrained, workers=2)
    assert np.array_equal(found.plain, workers.plain)
    assert np.array_equal(found.copies, workers.copies)
    some = taken(untrained, rows=(9, 2, 4))
    assert np.allclose(some.copies, found.copies[[9, 2, 4]], atol=1e-6)
    assert np.allclose(some.plain, found.plain[[9, 2, 4]], atol=1e-6)
    assert np.allclose(taken(untrained, copies=1).copies, found.copies[:, :1], atol=1e-6)
    monkeypatch.setattr("nearkin.evaluation.features.BATCH", 4)
    assert np.allclose(taken(untrained).copies, found.copies, atol=1e-6)
    other = taken(untrained, seed=1)
    assert np.array_equal(other.plain, found.plain)
    assert not np.allclose(other.copies, found.copies, atol=1e-3)
    assert not np.allclose(taken(untrained, flip=False).copies, found.copies, atol=1e-3)


def test_no_copies_are_the_plain_features(untrained):
    found = taken(untrained, copies=0)
    assert np.array_equal(found.copies, found.plain[:, None])


def test_a_feature_that_is_not_finite_is_an_error(untrained):
    bundle, _ = untrained
    std = bundle.network.std.clone()
    bundle.network.std.fill_(torch.nan)
    try:
        with pytest.raises(ModelError, match="not finite"):
            taken(untrained)
    finally:  # other tests use this network; monkeypatch does not restore a buffer
        bundle.network.std.copy_(std)


def test_the_stated_tolerance_is_the_solvers(monkeypatch):
    """A looser one would stop at other weights, and the comparison with Newton's method would see it."""
    x, y, queries = hard_episode("random", 5, 0)
    right = classify(x, y, queries)
    monkeypatch.setattr(episodes, "TOLERANCE", 0.5)
    assert not np.array_equal(classify(x, y, queries), right)
