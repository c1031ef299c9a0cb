"""Orthogonal projection loss (Ranasinghe et al. 2021, arXiv 2103.14021)."""

from __future__ import annotations

from pydantic import Field

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

        weight: float = Field(1.0, ge=0, description="weight of the orthogonality term")
        gamma: float = Field(0.5, ge=0, description="weight of the negative pairs inside it")
        views: int = Field(1, ge=1, le=8, description="crops per image")

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
