"""CosFace (Wang et al. 2018, arXiv 1801.09414)."""

from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import cosface_margin
from nearkin.objectives.margin import MarginSoftmax


class CosFace(MarginSoftmax, name="cosface"):
    """Softmax over cosines whose own class must win by a margin of the cosine (arXiv 1801.09414)."""

    class Config(MarginSoftmax.Config):
        """0.2 suits few classes; the paper's 0.35 with scale 30 is in the recipes."""

        margin: float = option(0.2, "subtracted from the own cosine", ge=0, lt=2)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        return cosface_margin(
            cosine, labels, margin=self.config.margin, scale=self.config.scale, validate=False
        )
