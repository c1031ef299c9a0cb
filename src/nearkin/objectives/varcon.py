"""VarCon (Wang et al. 2025, NeurIPS, arXiv 2506.07413)."""

from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, varcon
from nearkin.objectives.base import per_class
from nearkin.objectives.contrast import Contrastive


class VarCon(Contrastive, name="varcon"):
    """Samples against the class centres of the batch; targets follow confidence (arXiv 2506.07413).

    Joint with CE, or in two stages as published. A mixed image is computed for both of
    its classes.
    """

    term = "varcon"

    class Config(Contrastive.Config):
        """Temperature and epsilon as published."""

        epsilon: float = option(0.02, "how far the target's temperature follows confidence", ge=0)

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
