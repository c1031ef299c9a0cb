"""SupCon (Khosla et al. 2020): pull images of one class together, push the others away."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from nearkin.config import Auto, Count
from nearkin.functional import PerAnchor, mean_valid, supcon_in, supcon_out
from nearkin.network import Head, projection_head, projection_sizes
from nearkin.objectives.base import (
    Objective,
    Stage,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class SupCon(Objective, name="supcon"):
    """joint: total = CE + weight * supcon. two-stage: supcon alone, then CE on the frozen backbone.

    Heads: a projection that only contrasts, and a linear classifier, side by side on the pooled features.
    """

    class Config(Objective.Config):
        """Defaults: our choice (docs/methods), temperature as in the paper."""

        mode: Literal["joint", "two-stage"] = Field(
            "joint",
            description="with cross-entropy at once, or contrast first and then a classifier",
        )
        weight: float = Field(0.5, ge=0, description="weight of the contrastive term (joint)")
        variant: Literal["out", "in"] = Field("out", description="L_out or L_in of the paper")
        temperature: float = Field(0.1, gt=0, description="divides the cosine similarities")
        views: int = Field(2, ge=1, le=8, description="crops per image")
        contrast_share: float = Field(
            0.8, gt=0, lt=1, description="share of the epochs that contrast (two-stage)"
        )
        hidden: Count | Auto = Field("auto", description="hidden width of the projection")
        projection: Count | Auto = Field("auto", description="width of the projection")

        def resolve(self, facts: Facts) -> SupCon.Config:
            hidden, out = projection_sizes(facts.dim)
            return self.model_copy(
                update={
                    "hidden": hidden if self.hidden == "auto" else self.hidden,
                    "projection": out if self.projection == "auto" else self.projection,
                }
            )

    config: Config

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config.resolve(Facts(0, classes, 0, 0, dim))
        projection = projection_head(dim, int(sizes.hidden), int(sizes.projection))
        return {
            "projection": Head(projection, reads="features", writes="projection"),
            "classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        views, share = self.config.views, self.config.contrast_share
        if self.config.mode == "joint":
            return (Stage("joint", 1.0, ("projection", "classifier"), views=views, coupled=True),)
        return (
            Stage("contrast", share, ("projection",), views=views, coupled=True),
            Stage("linear", 1 - share, ("classifier",), freeze_backbone=True),
        )

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,
    ) -> Loss:
        if progress.stage == "linear":
            return self._classification(batch, student)
        if progress.stage == "contrast":
            return self._contrast(batch, student)
        ce, contrast = self._classification(batch, student), self._contrast(batch, student)
        return Loss(ce.total + self.config.weight * contrast.total, ce.terms | contrast.terms)

    def _classification(self, batch: Batch, student: Outputs) -> Loss:
        logits = required(student.logits)
        total = mean_valid(self.classify(logits, repeat_views(batch.labels, logits)))
        return Loss(total, {"ce": total.detach()})

    def _contrast(self, batch: Batch, student: Outputs) -> Loss:
        features = unit(required(student.projection))
        losses = self._supcon(features, repeat_views(batch.labels, features))
        total = mean_valid(losses)
        return Loss(total, {"supcon": total.detach(), "without_positive": lonely(losses)})

    def _supcon(self, features: Tensor, labels: Tensor) -> PerAnchor:
        function = supcon_out if self.config.variant == "out" else supcon_in
        return function(features, labels, temperature=self.config.temperature)


def lonely(losses: PerAnchor) -> Tensor:
    """The share of anchors that had no positive."""
    return 1.0 - losses.valid.to(losses.value.dtype).mean()
