"""Conformal prediction sets: classes that hold the right one in a chosen share of all images.

The same validation images choose the best epoch and fit the temperature, so the true share can be a little lower.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, stored
from nearkin.distributed import Runtime
from nearkin.evaluation.calibration import scaled
from nearkin.evaluation.ensemble import Ensemble, Member
from nearkin.evaluation.model import Bundle


class Sets(NamedTuple):
    """A class belongs to the set of an image where 1 - p <= limit; the most probable one always does.

    limit: infinite where there are too few validation images for the confidence, so that every class belongs.
    """

    confidence: float
    limit: float

    @classmethod
    def calibrated(cls, scores: Tensor, confidence: float) -> Sets:
        """From the rising `[V]` 1 - p(label) of the validation images.

        A class of score s has the conformal p-value (1 + #{scores >= s}) / (V + 1) and belongs where it is above
        1 - confidence (Vovk et al. 2005). So the limit is the k-th smallest score, k = ceil((V + 1) confidence).
        """
        # 100 * 0.55 is 55.00000000000001.
        rank = math.ceil((len(scores) + 1) * confidence - 1e-9)
        return cls(confidence, float(scores[rank - 1]) if rank <= len(scores) else math.inf)

    def members(self, probabilities: Tensor, top: Tensor) -> Tensor:
        """Boolean `[N, C]`: which classes belong. probabilities: `[N, C]`, scaled. top: `[N]` the most probable."""
        return (1 - probabilities <= self.limit).scatter(1, top[:, None], True)


class Coverage(NamedTuple):
    """share: of the images of the run's test split whose set holds their class. classes: mean size of the sets."""

    share: float
    images: int
    classes: float


def coverage(
    sets: Sets, run: Path, bundle: Bundle, temperature: float, device: torch.device
) -> Coverage:
    """What the sets do on the run's own test split. Its probabilities are kept in the run folder, as by `evaluate`.

    Raises DataError where the split is missing.
    """
    config = stored(RunConfig, run / CONFIG_FILE)
    order = torch.arange(len(bundle.classes), device=device)
    with Runtime(device=device.type, precision="fp32") as runtime:
        member = Member(run, bundle, config, order)
        ensemble = Ensemble([member], runtime, tta="none", workers="auto", cache=True)
        split, batches = ensemble.probabilities("test")
        held = size = 0
        for raw, labels, _ in batches:
            inside = sets.members(scaled(raw, temperature), raw.argmax(1))
            held += int(inside.gather(1, labels[:, None]).sum())
            size += int(inside.sum())
        shares = runtime.collect((held, size))  # each process has some of the images
    held, size = (sum(counts) for counts in zip(*shares, strict=True))
    images = len(split.labels)
    return Coverage(held / images, images, size / images)
