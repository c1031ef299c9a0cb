"""Contrasts in each measure, from predictions made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nearkin.comparison import results
from nearkin.comparison.results import UNTRAINED, Run, Scores, collect, contrasts
from nearkin.comparison.statistics import effect

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


def test_entries_without_a_verdict_do_not_count_in_holm():
    """One of two seeds, and one of which a run trained no epoch."""
    by_run = {}
    for seed in range(3):
        by_run["ce", seed] = scores(240, 80, 0.6, seed)
        by_run["cone", seed] = scores(244, 80, 0.6, seed + 50)
        by_run["idle", seed] = scores(270, 80, 0.6, seed + 70)
        if seed < 2:
            by_run["few", seed] = scores(270, 80, 0.6, seed + 90)
    found = {c.entry: c for c in contrasts(by_run, "ce", idle=["idle"]) if c.measure == "top1"}
    pair = {key: one for key, one in by_run.items() if key[0] in ("ce", "cone")}
    (alone,) = (c for c in contrasts(pair, "ce") if c.measure == "top1")
    assert found["cone"] == alone
    assert found["idle"].verdict == UNTRAINED
    assert found["few"].verdict.startswith("no verdict: 3 seeds")


def test_of_two_entries_the_smaller_p_value_is_doubled():
    """And the seeds that would decide are those for half the error (Holm)."""
    by_run = {}
    for seed, more in enumerate((0, 2, -2)):
        by_run["ce", seed] = scores(240, 80, 0.6, seed)
        by_run["near", seed] = scores(246 - 2 * more, 80, 0.6, seed + 70)
        by_run["far", seed] = scores(250 + 3 * more, 80, 0.6, seed + 50)
    found = {c.entry: c for c in contrasts(by_run, "ce") if c.measure == "top1"}
    right = {
        name: np.stack([by_run[name, seed].of("top1") for seed in range(3)])
        for name in ("ce", "near", "far")
    }
    near, far = (effect(right["ce"], right[name]) for name in ("near", "far"))
    assert far.p_value < near.p_value < 2 * near.p_value < 1
    assert found["far"].p_value == pytest.approx(2 * far.p_value)
    assert found["near"].p_value == pytest.approx(max(2 * far.p_value, near.p_value))
    for name, one, error in (("near", near, 0.05), ("far", far, 0.025)):
        more = one.seeds_to_decide(error, 0.005) - 3
        assert found[name].verdict == f"undecided: about {more} more seeds would decide"


def collected(folder):
    """`ce` and `cone` with three seeds."""
    entries = [SimpleNamespace(name=name) for name in ("ce", "cone")]
    terms = [SimpleNamespace(entry=entry, epochs=None, weights=1) for entry in entries]
    jobs = [
        SimpleNamespace(name=f"{entry.name}-seed{seed}", entry=entry, seed=seed)
        for entry in entries
        for seed in range(3)
    ]
    return collect(folder, terms, jobs, data="x", equal={})


def test_classes_are_compared_over_common_seeds(tmp_path, monkeypatch):
    """The third seed of `cone` has failed; that of `ce` was the best."""
    right = {("ce", 0): 200, ("ce", 1): 210, ("ce", 2): 300, ("cone", 0): 220, ("cone", 1): 230}

    def read(place, term, seed):
        name = term.entry.name
        run = Run(entry=name, seed=seed, folder=str(place), state="finished", epochs=3)
        return scores(right[name, seed], 80, 0.6, seed), run

    done = {tmp_path / "runs" / f"{name}-seed{seed}" for name, seed in right}
    monkeypatch.setattr(results, "stored_state", lambda p: "finished" if p in done else None)
    monkeypatch.setattr(results, "_read", read)
    compared = collected(tmp_path)
    means = {name: values["a"] for name, values in compared.classes.items()}
    assert means == pytest.approx({"ce": 205 / 300, "cone": 225 / 300})
    assert any("differences over common ones" in note for note in compared.notes)


@pytest.mark.parametrize(("epochs", "untrained"), [((3, 3), False), ((3, 0), True), ((0, 3), True)])
def test_a_run_without_an_epoch_gives_no_verdict(tmp_path, monkeypatch, epochs, untrained):
    given = dict(zip(("ce", "cone"), epochs, strict=True))

    def read(place, term, seed):
        name = term.entry.name
        run = Run(entry=name, seed=seed, folder=str(place), state="finished", epochs=given[name])
        return scores(240 if name == "ce" else 290, 80, 0.6, seed), run

    monkeypatch.setattr(results, "stored_state", lambda _: "finished")
    monkeypatch.setattr(results, "_read", read)
    compared = collected(tmp_path)
    assert (compared.verdict("cone") == UNTRAINED) == untrained
    assert any("without an epoch is its probe" in note for note in compared.notes) == untrained
