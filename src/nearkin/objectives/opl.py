"""Orthogonal projection loss (Ranasinghe et al. 2021, arXiv 2103.14021)."""

from __future__ import annotations

from nearkin.config import option
from nearkin.functional import orthogonal_projection
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Loss, Outputs, Progress


class OrthogonalProjection(Objective, name="opl"):
    """Each class along one direction, other classes at right angles to it (arXiv 2103.14021).

    total = CE + weight * L_opl of the pooled features, scaled to unit length.
    Heads: one linear classifier on the pooled features.
    """

    class Config(Objective.Config):
        """Weight and gamma as published."""

        weight: float = option(1.0, "weight of the orthogonality term", ge=0)
        gamma: float = option(0.5, "weight of the negative pairs inside it", ge=0)
        views: int = option(1, "crops per image", ge=1, le=8)

    config: Config

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("joint", 1.0, ("classifier",), views=self.config.views, coupled=True),)

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        logits = required(student.logits)
        labels = repeat_views(batch.labels, logits)
        opl = orthogonal_projection(
            unit(student.features), labels, gamma=self.config.gamma, validate=False
        )
        return combine(ce=(1.0, self.classify(logits, labels)), opl=(self.config.weight, opl))
