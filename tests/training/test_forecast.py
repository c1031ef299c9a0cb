"""The forecast of anchors without a positive, against counting."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from tests.training.settings_cases import data_settings

import nearkin
from nearkin.data.sampling import Draws, balanced, shuffled, weighted
from nearkin.errors import ConfigError
from nearkin.training.checks import missing_positives_warning, share_without_positive
from nearkin.training.defaults import check


def labels_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(("sizes", "batch"), [([3, 2, 1, 2], 3), ([5, 2], 4), ([1, 1, 6], 2)])
def test_the_mean_over_many_epochs_is_that_of_all_batches(sizes, batch):
    labels = labels_of(sizes)
    batches = [np.bincount(labels[list(b)]) for b in combinations(range(len(labels)), batch)]
    exact = np.mean([(counts == 1).sum() / batch for counts in batches])
    epochs = (shuffled(len(labels), 0, epoch) for epoch in range(2000))
    found = np.mean([share_without_positive(draws, labels, batch) for draws in epochs])
    assert found == pytest.approx(exact, rel=0.05, abs=5e-3)


def test_weighted_draws_have_the_share_of_independent_draws():
    labels = labels_of([400, 30, 30, 8, 1, 200, 7, 99, 3, 60, 20, 10])
    counted = np.mean(
        [share_without_positive(weighted(labels, 0, e), labels, 16) for e in range(100)]
    )
    assert counted == pytest.approx((1 - 1 / 12) ** 15, rel=0.03)


def test_edges():
    assert share_without_positive(shuffled(10, 0, 0), labels_of([5, 5]), 10) == 0.0
    assert share_without_positive(shuffled(8, 0, 0), labels_of([1] * 8), 4) == 1.0
    draws = Draws(np.array([0, 1, 2, 3]), np.zeros(4, dtype=np.int64))
    assert share_without_positive(draws, np.array([0, 0, 1, 2]), 4) == 0.5


def test_positives_are_counted_in_the_blocks_of_an_anchor():
    draws = Draws(np.array([0, 1, 2, 3, 4, 5, 6, 7]), np.zeros(8, dtype=np.int64))
    labels = np.array([0, 0, 1, 2, 1, 2, 3, 3])
    assert share_without_positive(draws, labels, 8) == 0.0
    assert share_without_positive(draws, labels, 8, within=4) == 0.5
    assert share_without_positive(draws, labels, 8, within=3) == 2 / 8  # 0 0 1 | 2 1 2 | 3 3
    assert share_without_positive(draws, labels, 8, within=20) == 0.0


def test_balanced_batches_have_next_to_none():
    labels = labels_of([20] * 50)
    assert share_without_positive(shuffled(1000, 0, 0), labels, 32) > 0.5
    assert share_without_positive(balanced(labels, 0, 0, 32, 4), labels, 32) == 0.0
    assert share_without_positive(weighted(labels, 0, 0), labels, 32) > 0.4


def test_what_it_says():
    assert missing_positives_warning(0.05, 32, "shuffle") is None
    for sampler in ("shuffle", "weighted"):
        text = missing_positives_warning(0.506, 32, sampler)
        assert "About 51 %" in text
        assert "Use --sampler balanced, a larger --batch-size, or --objective.views 2" in text
    assert "Use another --per-class, a larger --batch-size" in missing_positives_warning(
        0.506, 32, "balanced"
    )


def train(folder, capfd, **options):
    common = {"images_per_class": 4, "epochs": 1, "batch_size": 16, "model": "test_resnet"}
    result = nearkin.train(
        "digits", quiet=False, threads=1, out=folder / "run", **(common | options)
    )
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    return result, lines


def test_train_warns_before_it_starts(tmp_path, capfd):
    _, lines = train(
        tmp_path, capfd, objective="supcon", objective_options={"views": 1}, batch_size=4
    )
    assert len(lines) == 1
    assert "no other image of their class among the 4 that" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "balanced", "batch_size": 30}, "no multiple of --per-class 4; use 28, 32, or"),
        ({"sampler": "balanced", "batch_size": 4, "per_class": 8}, "--per-class 8; use 8, or"),
        (
            {"sampler": "balanced", "repeats": 2},
            "--repeats 2 needs --sampler shuffle, not balanced",
        ),
        (
            {"sampler": "weighted", "repeats": 3},
            "--repeats 3 needs --sampler shuffle, not weighted",
        ),
        ({"repeats": 33}, "--repeats 33 is more than --batch-size 32"),
    ],
)
def test_options_that_do_not_fit_together(options, message):
    with pytest.raises(ConfigError, match=message):
        check(
            data_settings(**({"mixup": 0, "cutmix": 0, "batch_size": 32} | options)),
            images=99,
            world_size=1,
        )


def test_options_that_fit():
    for options in (
        {"sampler": "balanced"},
        {"sampler": "weighted"},
        {"repeats": 3},
        {"per_class": 5},
    ):
        config = data_settings(batch_size=32, mixup=0, cutmix=0, **options)
        check(config, images=99, world_size=1)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("supcon", {"batch_size": 4}),
        ("ce", {"batch_size": 4}),
        ("triplet", {"sampler": "balanced"}),
    ],
)
def test_and_only_then(objective, options, tmp_path, capfd):
    _, lines = train(tmp_path, capfd, objective=objective, **options)
    assert lines == []
