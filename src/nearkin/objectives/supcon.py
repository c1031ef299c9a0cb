"""SupCon (Khosla et al. 2020, arXiv 2004.11362)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, supcon_in, supcon_out
from nearkin.objectives.contrast import Contrastive


class SupCon(Contrastive, name="supcon"):
    """Pull the images of one class together, push all others away (arXiv 2004.11362).

    Joint with CE, or in two stages as published.
    """

    term = "supcon"

    class Config(Contrastive.Config):
        """Temperature as published."""

        variant: Literal["out", "in"] = option("out", "L_out or L_in of the paper")

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        function = supcon_out if self.config.variant == "out" else supcon_in
        return function(features, labels, temperature=self.config.temperature, validate=False)
