"""ArcFace (Deng et al. 2019, arXiv 1801.07698)."""

from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import arcface_margin
from nearkin.objectives.margin import MarginSoftmax


class ArcFace(MarginSoftmax, name="arcface"):
    """Softmax over cosines whose own class must win by a margin of the angle (arXiv 1801.07698)."""

    class Config(MarginSoftmax.Config):
        """0.2 suits few classes; the paper's 0.5 with scale 64 learns nothing there."""

        margin: float = option(0.2, "radians added to the own angle", ge=0, lt=3.14)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        return arcface_margin(
            cosine, labels, margin=self.config.margin, scale=self.config.scale, validate=False
        )
