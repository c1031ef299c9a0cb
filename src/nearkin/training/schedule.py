"""Learning rate and other schedules: pure functions of the step, so that there is nothing to save."""

from __future__ import annotations

import math


def lr_factor(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """The learning rate of `step` (from 0) over its peak: linear warm-up, then a cosine to `floor`.

    warm-up: (step + 1) / (warmup + 1), so that the first step already learns and step `warmup` has the peak.
    cosine: floor + (1 - floor)(1 + cos(pi t)) / 2 with t from 0 at the end of the warm-up to 1 at the last step.
    Source: our choice of end points; the shape is the field's.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (1.0 - floor) * (1.0 + math.cos(math.pi * min(1.0, t))) / 2.0
