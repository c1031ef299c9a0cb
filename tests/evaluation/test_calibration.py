"""The temperature is that of the process that drew the labels."""

from __future__ import annotations

import math

import pytest
import torch

from nearkin.evaluation.calibration import fit_temperature, scaled


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_finds_the_temperature_that_the_labels_were_drawn_at(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 7, generator=generator)
    true = (logits / temperature).softmax(1)
    labels = torch.multinomial(true, 1, generator=generator)[:, 0]
    found = fit_temperature(logits.softmax(1), labels)
    assert found == pytest.approx(temperature, rel=0.04)
    assert torch.allclose(scaled(logits.softmax(1), temperature), true, atol=1e-5)


def test_is_the_minimum_on_a_grid():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 3, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    rows = logits.softmax(1)
    margin = (rows.log().topk(2).values @ torch.tensor([1.0, -1.0])).mean()

    def loss(t):
        nll = torch.nn.functional.cross_entropy(logits / t, labels, reduction="sum")
        return float(nll) + math.log1p(math.exp(float(margin) / t))

    best = min((loss(0.05 * 1.002**k), 0.05 * 1.002**k) for k in range(3000))[1]
    assert fit_temperature(rows, labels) == pytest.approx(min(best, 20.0), rel=0.01)


def test_ten_right_answers_do_not_make_certainty():
    rows = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    found = scaled(rows, fit_temperature(rows, torch.zeros(10, dtype=torch.long)))
    assert float(found[0, 0]) == pytest.approx(10 / 11, abs=1e-3)  # Laplace: one more image, wrong


def test_probabilities_of_zero_stay_finite():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    temperature = fit_temperature(rows, torch.tensor([0, 2]))
    assert 0.05 <= temperature <= 20
    assert bool(scaled(rows, temperature).isfinite().all())
