"""The numbers of the reliability diagram and of coverage, and that every value is drawn."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from nearkin.evaluation.metrics import calibration_error
from nearkin.report import charts
from nearkin.report.charts import Reliability, Share, bins, coverage, covered, reliability, shares


def predictions(n=500):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, n).astype(np.float32)
    return confidence, rng.uniform(size=n) < confidence**2


def test_bins_by_a_loop():
    confidence, correct = predictions()
    for number, found in enumerate(bins(confidence, correct), start=2):
        inside = [k for k, c in enumerate(confidence) if number / 10 < c <= (number + 1) / 10]
        assert found.images == len(inside)
        assert found.confidence == pytest.approx(np.mean(confidence[inside]))
        assert found.accuracy == pytest.approx(np.mean(correct[inside]))


def test_bins_give_the_calibration_error(monkeypatch):
    monkeypatch.setattr(charts, "BINS", 15)
    confidence, correct = predictions()
    gaps = sum(b.images * abs(b.accuracy - b.confidence) for b in bins(confidence, correct))
    assert gaps / 500 == pytest.approx(
        calibration_error(confidence.astype(float), correct), rel=1e-5
    )


def test_coverage_by_a_loop():
    confidence, correct = predictions()
    order = sorted(range(500), key=lambda k: -confidence[k])
    for share, accuracy in covered(confidence, correct):
        kept = order[: round(share * 5)]
        assert accuracy == pytest.approx(100 * np.mean(correct[kept]))
    assert covered(confidence, correct)[-1] == (100, pytest.approx(100 * correct.mean()))
    assert len(covered(confidence[:1], correct[:1])) == 1


def elements(picture, name):
    root = ElementTree.fromstring(picture)
    return [e for e in root.iter() if name in (e.get("class") or "").split()]


def test_every_value_is_drawn():
    rows = [Share("a<b", 0.5, 0.4, 0.6, "50 %"), Share("b", 1.0, 0.9, 1.0, "100 %")]
    drawn = shares(rows, title="t", description="d", label="l")
    widths = [float(e.get("width")) for e in elements(drawn, "plain")]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1)
    assert len(elements(drawn, "whisker")) == 2
    confidence, correct = predictions()
    found = [Reliability(name, bins(confidence, correct), k) for k, name in enumerate("ab")]
    picture = reliability(found, title="t", description="d")
    assert len(elements(picture, "mark")) == 2 * 8 + 2  # and the legend
    line = elements(coverage(covered(confidence, correct), title="t", description="d"), "mean")
    assert len(line) == 1
