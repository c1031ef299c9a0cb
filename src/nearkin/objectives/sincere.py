"""SINCERE (Feeney and Hughes 2023, arXiv 2309.14277)."""

from __future__ import annotations

from torch import Tensor

from nearkin.functional import PerAnchor, sincere
from nearkin.objectives.contrast import Contrastive


class Sincere(Contrastive, name="sincere"):
    """Each positive alone against the other classes: no positive repels another (arXiv 2309.14277).

    Joint with CE, or in two stages as published.
    """

    term = "sincere"

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        return sincere(features, labels, temperature=self.config.temperature, validate=False)
