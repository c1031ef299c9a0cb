"""The sentences of a report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, fisher_exact
from tests.report.reports import facts, report_data, small

from nearkin.report.browser import percent
from nearkin.report.run import run_page
from nearkin.report.words import (
    before_tile,
    candidates,
    difference,
    extent,
    headline,
    look_first,
    probe_tile,
    weakest,
)


@pytest.mark.parametrize(
    ("better", "worse", "same"), [(9, 2, 30), (3, 3, 10), (0, 0, 5), (0, 7, 1)]
)
def test_the_difference_of_two_runs(better, worse, same):
    pairs = [(True, False)] * better + [(False, True)] * worse + [(True, True)] * same
    mine = {f"{k}.jpg": pair[0] for k, pair in enumerate(pairs)} | {"only mine": True}
    other = {f"{k}.jpg": pair[1] for k, pair in enumerate(pairs)} | {"only other": False}
    found = difference(mine, other)
    n = len(pairs)
    assert (found.better, found.worse, found.images) == (better, worse, n)
    assert found.value == pytest.approx((better - worse) / n)
    # Wald's interval of the four cells with half an image more in each.
    values = np.array([1.0, -1.0, 0.0])
    shares = np.array([better + 0.5, worse + 0.5, n - better - worse + 1]) / (n + 2)
    mean = (values * shares).sum()
    error = np.sqrt(((values - mean) ** 2 * shares).sum() / (n + 2))
    assert (found.low, found.high) == pytest.approx(
        (mean - 1.96 * error, mean + 1.96 * error), 1e-3
    )
    expected = binomtest(better, better + worse).pvalue if better + worse else 1
    assert found.p == pytest.approx(expected)


def test_runs_without_a_common_image_have_no_difference():
    assert difference({"a": True}, {"b": True}) is None
    assert before_tile({"a": True}, "other", {"b": True}) is None


def test_the_headline():
    data = small()
    right = round(data.metrics.top1 * 40)
    assert headline(data) == f"{2.5 * right:.1f} % of the test images are recognised"
    assert f"40 images of 4 classes, {40 - right} errors." in extent(data)
    assert "95 % interval" in extent(data)
    assert "too good" not in extent(data)
    assert "too good" in extent(report_data(split="val"))


def test_a_headline_does_not_round_errors_away():
    data = small()
    almost = replace(data, metrics=replace(data.metrics, top1=0.9996))
    assert headline(almost) == "> 99.9 % of the test images are recognised"


def test_what_is_counted_and_not_shown_is_said():
    """More suspicious labels than are listed, more training images than kin, errors of a part of the images."""
    data = replace(small(), mislabelled=300, trained=20_000, training=50_000)
    found = next(each for each in look_first(data) if each.where == "suspicious")
    assert found.text.startswith("300 training images of 20000 looked at may have a wrong label")
    assert found.link == f"See the {len(data.suspicious)} most suspicious"
    certain = replace(data.images, probability=np.ones_like(data.images.probability))
    whole = replace(data, images=certain)
    part = replace(whole, metrics=replace(data.metrics, n=10 * data.metrics.n))
    for each, words in (
        (whole, " errors were made"),
        (part, " of the 40 images in this page were"),
    ):
        (text,) = (e.text for e in look_first(each) if e.where == "worst")
        assert words in text
    several = replace(whole, worst=data.worst[:3])
    assert "See 3 of them" in [each.link for each in look_first(several)]


def test_what_to_look_at_first():
    data = small()
    texts = [each.text for each in look_first(data)]
    pair = data.pairs[0]
    assert f"{pair.true} taken for {pair.predicted}." in texts[0]
    assert texts[1].startswith("2 training images of 60 may have a wrong label")
    perfect = look_first(report_data(errors=0, flipped=0))
    assert [each.where for each in perfect] == ["uncertain"]
    one = report_data(flipped=1)
    assert "1 training image of 60 may have a wrong label" in " ".join(
        e.text for e in look_first(one)
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1], "The only error is a taken for b."),
        ([4], "All errors are a taken for b."),
        ([4, 1], "Most errors are a taken for b."),
        ([2, 2, 1], "2 of 5 errors are a taken for b."),
        ([1, 1], "The 2 errors are of 2 kinds, such as a taken for b."),
    ],
)
def test_the_sentence_about_errors(counts, expected):
    data = small()
    pairs = tuple(data.pairs[0]._replace(true="a", predicted="b", images=n) for n in counts)
    metrics = replace(data.metrics, n=100, top1=1 - sum(counts) / 100)
    assert look_first(replace(data, pairs=pairs, metrics=metrics))[0].text == expected


@pytest.mark.parametrize(
    ("right", "support", "said"),
    [(5, 20, True), (0, 4, True), (3, 4, False), (15, 20, False), (18, 20, False)],
)
def test_a_class_is_called_weak_when_chance_does_not_explain_it(right, support, said):
    data = small()
    others = [each._replace(recall=0.9, support=100) for each in data.metrics.per_class[1:]]
    weak = data.metrics.per_class[0]._replace(recall=right / support, support=support)
    n = support + 100 * len(others)
    top1 = (right + 90 * len(others)) / n
    metrics = replace(data.metrics, n=n, top1=top1, per_class=(weak, *others))
    table = [[right, support - right], [90 * len(others), 10 * len(others)]]
    chance = fisher_exact(table, alternative="less").pvalue
    assert (chance * (1 + len(others)) <= 0.05) == said
    texts = [each.text for each in look_first(replace(data, metrics=metrics))]
    expected = f"{weak.name} is recognised less often than the rest, beyond chance: {right} of {support} images."
    assert (expected in texts) == said
    assert (weakest(metrics) is weak) == said


def test_equal_classes_are_rarely_called_weak():
    """Errors that fall on 81 classes of 31 images by chance: the weakest is named in at most 5 % of the reports."""
    data, rng, named = small(), np.random.default_rng(0), 0
    for _ in range(200):
        recalls = rng.binomial(31, 0.8, 81) / 31
        rows = tuple(
            data.metrics.per_class[0]._replace(recall=float(recall), support=31)
            for recall in recalls
        )
        metrics = replace(data.metrics, n=31 * 81, top1=float(recalls.mean()), per_class=rows)
        texts = [each.text for each in look_first(replace(data, metrics=metrics))]
        named += any("beyond chance" in text for text in texts)
    assert named <= 10


def test_fine_tuning_is_compared_with_the_probe():
    tile = probe_tile(facts(small()).lines)
    assert tile.value == "+15.0 points"
    assert "from 70.0 %" in tile.text
    assert "to 85.0 %" in tile.text
    assert probe_tile(facts(small()).lines[:1]).value == "70.0 %"
    assert probe_tile(facts(small()).lines[1:]) is None
    lines = [dict(line) for line in facts(small()).lines]
    lines[0]["top1"] = 0.9  # no epoch reaches it, so the probe was kept
    assert probe_tile(lines).value == "nothing gained"


def test_a_classifier_that_was_fitted_anew_is_the_one_that_is_told():
    lines = list(facts(small()).lines)
    fit = {"kind": "refit", "stage": "all", "step": 30, "epoch": 0, "before": 0.85, "value": 0.95}
    assert probe_tile([*lines, fit | {"kept": True}]).text.endswith("to 95.0 %.")
    assert probe_tile([*lines, fit | {"kept": False}]).text.endswith("to 85.0 %.")
    text = run_page(small(), facts(small())._replace(lines=(*lines, fit | {"kept": True})))
    assert "its weights were kept. Then the classifier was fitted anew: 95.0 %." in text


def test_only_the_last_stage_and_the_probe_gave_weights_to_choose_from():
    lines = [
        {"kind": "validation", "stage": stage, "step": step, "value": value, "top1": value}
        for step, (stage, value) in enumerate([("probe", 0.7), ("first", 0.95), ("last", 0.88)])
    ]
    lines.insert(1, {"kind": "validation", "stage": "first", "step": 0, "value": 0.99})  # of kNN
    assert candidates(lines) == [0.7, 0.88]
    assert probe_tile(lines).text.endswith("to 88.0 %.")


def test_an_earlier_run_is_compared_image_by_image():
    right = facts(small()).right
    tile = before_tile(right, "runs/earlier", dict.fromkeys(right, True))
    wrong = sum(not hit for hit in right.values())
    assert tile.value == f"−{wrong / 0.4:.1f} points"  # noqa: RUF001
    assert tile.text.endswith(
        f"worse. 0 images only this run recognises, {wrong} only runs/earlier. Another seed of the same training gives "
        "another number."
    )
    same = before_tile(right, "runs/earlier", right)
    assert "no difference is shown" in same.text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.5, "50 %"),
        (1.0, "100 %"),
        (0.9999, "> 99 %"),
        (0.0, "0 %"),
        (0.001, "< 1 %"),
        (0.99, "99 %"),
    ],
)
def test_certainty_is_not_rounded_into_the_page(share, text):
    assert percent(share) == text
