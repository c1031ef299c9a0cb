"""The probe: scikit-learn's logistic regression, its strength by held-out images, and how it starts a classifier."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nearkin.objectives import Objective, get
from nearkin.training import probe as probe_module
from nearkin.training.probe import FOLDS, ITERATIONS, STRENGTHS, USUAL, fit, readable


def clouds(classes, each, dim=6, spread=1.0, seed=0, centres=7):
    """Features `[N, 2, dim]` around one centre a class, and labels; the second view is a little off."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(centres).normal(size=(classes, dim)) * 2
    labels = np.repeat(np.arange(classes), each)
    first = middle[labels] + spread * rng.normal(size=(len(labels), dim))
    views = np.stack([first, first + 0.1 * rng.normal(size=first.shape)], 1)
    return views.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_the_result_of_scikit_learn(classes):
    features, labels = clouds(classes, 20)
    held_out, own = clouds(classes, 30, seed=1)
    probe = fit(features, labels, (held_out, own), classes)
    rows, twice = features.reshape(-1, 6), np.repeat(labels, 2)
    model = LogisticRegression(C=probe.strength, max_iter=ITERATIONS, tol=1e-3).fit(rows, twice)
    logits = torch.from_numpy(held_out[:, 0]) @ probe.weight.T + probe.bias
    expected = model.predict_proba(held_out[:, 0])
    np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-5)


def test_the_strength_is_the_one_with_the_most_hits():
    features, labels = clouds(4, 8, spread=2.5)
    held_out, own = clouds(4, 50, spread=2.5, seed=1)
    rows, twice = features.reshape(-1, 6), np.repeat(labels, 2)
    hits = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3).fit(rows, twice)
        hits[strength] = int((model.predict(held_out[:, 0]) == own).sum())
    assert len(set(hits.values())) > 1  # or any choice would do
    chosen = fit(features, labels, (held_out, own), 4).strength
    assert hits[chosen] == max(hits.values())


@pytest.mark.parametrize(("each", "joined"), [(4, True), (5, False)])
def test_few_validation_images_are_joined_by_cross_validation(each, joined, monkeypatch):
    given = []

    def scored(classes, strength, folds):
        given.append(len(folds))
        return 0, 0.0

    monkeypatch.setattr(probe_module, "_score", scored)
    features, labels = clouds(3, 12)
    fit(features, labels, clouds(3, each, seed=2), 3)
    assert set(given) == {1 + FOLDS if joined else 1}


def test_one_image_a_class_and_no_validation_takes_the_usual_strength():
    features, labels = clouds(3, 1)
    assert fit(features, labels, None, 3).strength == USUAL


@pytest.mark.parametrize("labels", [[0, 1, 1, 1, 1, 1], [0, 1, 1], [0, 1]])
@pytest.mark.parametrize("validated", [False, True])
def test_the_only_image_of_one_of_two_classes(labels, validated):
    """A fold without it has one class only, of which nothing can be learned."""
    labels = np.array(labels)
    features = np.random.default_rng(0).normal(size=(len(labels), 2, 4)).astype(np.float32)
    features += labels[:, None, None]
    held_out = (features, labels) if validated else None
    assert fit(features, labels, held_out, 2).weight.shape == (2, 4)


def test_a_class_that_a_fold_lacks_is_improbable_there_but_learned_in_the_end():
    features, labels = clouds(3, 6)
    kept = np.flatnonzero((labels != 2) | (np.arange(len(labels)) == len(labels) - 1))
    probe = fit(features[kept], labels[kept], None, 3)
    logits = torch.from_numpy(features[-1, 0]) @ probe.weight.T + probe.bias
    assert logits.argmax() == 2


def test_a_last_class_without_images_is_improbable():
    """Its folder may be gone when a run goes on; that is said later, in one sentence."""
    features, labels = clouds(3, 6)
    probe = fit(features, labels, None, 4)
    assert probe.weight.shape == (4, 6)
    logits = torch.from_numpy(features[:, 0]) @ probe.weight.T + probe.bias
    assert 3 not in logits.argmax(1)


THREADS = """
import numpy as np, torch
from threadpoolctl import threadpool_info
from nearkin.training import probe

inside, fitted = set(), probe._fitted

def pools():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

def watched(*given):
    inside.update(pools())
    return fitted(*given)

probe._fitted = watched
torch.set_num_threads(1)
features = np.random.default_rng(0).normal(size=(12, 2, 4)).astype(np.float32)
probe.fit(features, np.repeat(np.arange(3), 4), None, 3)
print(inside, max(pools()))
"""


def test_the_probe_keeps_to_the_threads_of_the_run():
    """NumPy and SciPy have pools of their own. In a fresh process, since the tests limit them to one thread."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["{1}", "2"]


def test_a_large_problem_gets_fewer_iterations(monkeypatch):
    given = []

    class Planted(LogisticRegression):
        def __init__(self, **options):
            given.append(options.pop("max_iter"))
            super().__init__(max_iter=5, **options)

    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", Planted)
    features, labels = clouds(3, 6)
    for large, most in ((probe_module.LARGE, 300), (2 * 18 * 3 // 2, 150), (1, 30)):
        monkeypatch.setattr(probe_module, "LARGE", large)
        fit(features, labels, None, 3)
        assert given[-1] == most


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_every_objective_can_start_from_a_probe_where_its_classifier_reads_the_features(name):
    for pretrained in (False, True):
        heads = get(name)(dim=8, classes=3, pretrained=pretrained).heads
        classifier = readable(heads)
        assert classifier is not None
        assert heads[classifier].module.weight.shape == (3, 8)


def test_a_classifier_that_reads_the_embedding_cannot_start_from_a_probe():
    published = get("cone")
    config = published.Config(classifier="embedding")
    assert readable(published(config, dim=8, classes=3).heads) is None
