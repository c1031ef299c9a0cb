"""Prediction sets: those of the p-values of crepes, and they hold the right class as often as promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crepes import ConformalClassifier

from nearkin.evaluation.sets import Sets


def drawn(images, seed):
    """Probabilities of 5 classes, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    rows = (2 * torch.randn(images, 5, generator=generator)).softmax(1)
    return rows, torch.multinomial(rows, 1, generator=generator)[:, 0]


def calibration(images, seed=0):
    rows, labels = drawn(images, seed)
    return (1 - rows.gather(1, labels[:, None])[:, 0]).sort().values


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("images", [1, 7, 9, 19, 20, 99, 150])
def test_the_sets_are_those_of_the_p_values_of_crepes_and_the_most_probable_class(
    images, confidence
):
    scores = calibration(images)
    scores[: images // 2] = scores[0]  # ties
    rows, _ = drawn(200, 1)
    rows[:3] = 1 - scores[:3, None] if images > 2 else rows[:3]  # scores that occurred
    theirs = ConformalClassifier().fit(scores.numpy())
    p = theirs.predict_p((1 - rows).numpy(), smoothing=False)
    wanted = (np.round(p * (images + 1)) > round((1 - confidence) * (images + 1), 6)).astype(int)
    top = rows.argmax(1)
    wanted[np.arange(200), top.numpy()] = 1
    found = Sets.calibrated(scores, confidence).members(rows, top)
    assert found.int().tolist() == wanted.tolist()


def test_the_sets_hold_the_right_class_as_often_as_promised():
    sets = Sets.calibrated(calibration(2000), 0.9)
    rows, labels = drawn(20_000, 1)
    inside = sets.members(rows, rows.argmax(1))
    share = float(inside.gather(1, labels[:, None]).float().mean())
    assert share == pytest.approx(0.9, abs=0.02)
    assert int(inside.sum(1).min()) == 1
    assert float(inside.float().sum(1).mean()) < 4, "smaller than all classes"


def test_too_few_images_give_every_class():
    rows, _ = drawn(10, 0)
    assert bool(Sets.calibrated(calibration(18), 0.95).members(rows, rows.argmax(1)).all())
    assert not bool(Sets.calibrated(calibration(40), 0.95).members(rows, rows.argmax(1)).all())
