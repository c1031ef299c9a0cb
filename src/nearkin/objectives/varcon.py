"""VarCon (Wang et al. 2025, NeurIPS, arXiv 2506.07413)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from nearkin.functional import PerAnchor, varcon
from nearkin.objectives.base import per_class
from nearkin.objectives.contrast import Contrastive


class VarCon(Contrastive, name="varcon"):
    """Samples against the class centres of the batch; targets follow confidence (arXiv 2506.07413).

    Joint with CE at weight 0.5 (our choice), or in two stages as published. Of a mixed image both classes are
    taken in turn.
    """

    term = "varcon"

    class Config(Contrastive.Config):
        """Temperature and epsilon as published; the joint weight and the sizes are our choice."""

        epsilon: float = Field(
            0.02, ge=0, description="how far the target's temperature follows confidence"
        )

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        def centred(classes: Tensor) -> PerAnchor:
            return varcon(
                features,
                classes,
                temperature=self.config.temperature,
                epsilon=self.config.epsilon,
                validate=False,
            )

        return per_class(centred, labels)
