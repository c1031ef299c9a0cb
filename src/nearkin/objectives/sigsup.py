"""Supervised contrast with a sigmoid for each pair (arXiv 2512.17954; the loss of SigLIP, arXiv 2303.15343)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, sigsup
from nearkin.network import Head, ScaleBias
from nearkin.objectives.base import Stage, required, unit
from nearkin.objectives.contrast import Contrastive
from nearkin.types import Outputs


class SigSup(Contrastive, name="sigsup"):
    """A sigmoid for each pair, same class or not, with learned scale and bias (arXiv 2512.17954).

    Joint with CE, or in two stages as published. The scale and the bias are a head of their own: the network trains and
    saves them, and no classifier reads them.
    """

    term = "sigsup"

    class Config(Contrastive.Config):
        """Temperature and bias at the start as in SigLIP."""

        temperature: float = option(
            0.1, "divides the cosine similarities; learned, this is its start", gt=0
        )
        bias: float = option(-10.0, "is added to them; learned, this is its start", ge=-100, le=100)
        normalise: Literal["positives", "none"] = option(
            "positives", "divide an anchor's sum by its positives, or not (SigLIP)"
        )

    config: Config

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        start = ScaleBias(-math.log(self.config.temperature), self.config.bias)
        return {"scale": Head(start, "features", "scale_bias")} | super().build(dim, classes)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(
            stage._replace(heads=("scale", *stage.heads)) if "projection" in stage.heads else stage
            for stage in super().stages()
        )

    def losses(self, student: Outputs, labels: Tensor) -> PerAnchor:
        log_scale, bias = required(student.scale_bias)[0]
        return sigsup(
            unit(required(student.projection)),
            labels,
            log_scale=log_scale,
            bias=bias,
            normalise=self.config.normalise,
            validate=False,
        )
