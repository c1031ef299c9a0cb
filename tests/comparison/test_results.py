"""Contrasts in each measure, from predictions made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nearkin.comparison import results
from nearkin.comparison.results import UNTRAINED, Run, Scores, collect, contrasts

LABELS = ("a",) * 300 + ("b",) * 100


def scores(right_a, right_b, probability, seed):
    """So many right answers in each class, others at another seed; one probability of the label for all images."""
    draw = np.random.default_rng(seed)
    right = np.concatenate(
        [draw.permutation(300) < right_a, draw.permutation(100) < right_b]
    ).tolist()
    other = {"a": "b", "b": "a"}
    predicted = tuple(
        label if hit else other[label] for label, hit in zip(LABELS, right, strict=True)
    )
    return Scores(
        tuple(map(str, range(400))), LABELS, predicted, np.full(400, probability + 0.001 * seed)
    )


def found(measure):
    """Of `cone` over `ce`: 30 of 300 more right in the large class, 30 of 100 fewer in the small one, and more sure."""
    by_run = {}
    for seed in range(5):
        by_run["ce", seed] = scores(240, 80, 0.6, seed)
        by_run["cone", seed] = scores(270, 50, 0.7, seed)
    return next(each for each in contrasts(by_run, "ce") if each.measure == measure)


def test_top1_counts_every_image():
    assert found("top1").difference == pytest.approx(0.0)
    assert found("top1").wins == 0


def test_balanced_accuracy_counts_every_class():
    balanced = found("balanced")
    assert balanced.difference == pytest.approx((30 / 300 - 30 / 100) / 2)
    assert (balanced.verdict, balanced.wins) == ("worse", 0)


def test_a_lower_log_loss_is_better():
    loss = found("log_loss")
    wanted = np.mean([np.log(0.7 + 0.001 * s) - np.log(0.6 + 0.001 * s) for s in range(5)])
    assert loss.difference == pytest.approx(wanted)
    assert (loss.verdict, loss.wins) == ("better", 5)


@pytest.mark.parametrize(("spread", "same"), [(0.02, True), (0.5, False)])
def test_the_band_of_the_log_loss_is_a_hundredth(spread, same):
    """Noise around no difference: its 90 % interval is about 0.001 and 0.02 wide on each side."""
    draw, by_run = np.random.default_rng(0), {}
    for seed in range(5):
        one = scores(240, 80, 0.6, seed)
        noise = np.exp(draw.normal(0, spread, 400))
        by_run["ce", seed] = one
        by_run["cone", seed] = one._replace(probability=one.probability * noise)
    loss = next(each for each in contrasts(by_run, "ce") if each.measure == "log_loss")
    assert (loss.verdict == "the same within 0.01") == same


@pytest.mark.parametrize(("epochs", "untrained"), [((3, 3), False), ((3, 0), True), ((0, 3), True)])
def test_a_run_without_an_epoch_gives_no_verdict(tmp_path, monkeypatch, epochs, untrained):
    given = dict(zip(("ce", "cone"), epochs, strict=True))

    def read(place, term, seed):
        name = term.entry.name
        run = Run(entry=name, seed=seed, folder=str(place), state="finished", epochs=given[name])
        return scores(240 if name == "ce" else 290, 80, 0.6, seed), run

    monkeypatch.setattr(results, "stored_state", lambda _: "finished")
    monkeypatch.setattr(results, "_read", read)
    entries = {name: SimpleNamespace(name=name) for name in given}
    terms = [SimpleNamespace(entry=e, epochs=None, weights=1) for e in entries.values()]
    jobs = [
        SimpleNamespace(name=f"{name}-seed{seed}", entry=entry, seed=seed)
        for name, entry in entries.items()
        for seed in range(3)
    ]
    compared = collect(tmp_path, terms, jobs, data="x", equal={})
    assert (compared.verdict("cone") == UNTRAINED) == untrained
    assert any("without an epoch is its probe" in note for note in compared.notes) == untrained
