"""What the contrastive objectives share: a projection that only contrasts, beside a linear classifier."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field
from torch import Tensor, nn

from nearkin.config import Auto, Count
from nearkin.functional import PerAnchor
from nearkin.network import Head, Norm, projection_head, projection_sizes
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    lonely,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class Contrastive(Objective):
    """joint: total = CE + weight * contrast. two-stage: the contrast alone, then CE on the frozen backbone.

    A subclass gives `contrast`, the losses of unit rows, and `term`, their name in the journal.
    Heads: a projection, and a linear classifier, side by side on the pooled features.
    """

    term: str

    class Config(Objective.Config):
        """Options of every contrastive objective; the weight of each is its own."""

        mode: Literal["joint", "two-stage"] = Field(
            "joint",
            description="with cross-entropy at once, or contrast first and then a classifier",
        )
        weight: float = Field(0.5, ge=0, description="weight of the contrastive term (joint)")
        temperature: float = Field(0.1, gt=0, description="divides the cosine similarities")
        views: int = Field(2, ge=1, le=8, description="crops per image")
        contrast_share: float = Field(
            0.8, gt=0, lt=1, description="share of the epochs that contrast (two-stage)"
        )
        hidden: Count | Auto = Field("auto", description="hidden width of the projection")
        projection: Count | Auto = Field("auto", description="width of the projection")
        head_norm: Norm = Field("batch", description="in the projection: batch, layer or none")

        def resolve(self, facts: Facts) -> Self:
            hidden, out = projection_sizes(facts.dim)
            return self.model_copy(
                update={
                    "hidden": hidden if self.hidden == "auto" else self.hidden,
                    "projection": out if self.projection == "auto" else self.projection,
                }
            )

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        """The contrastive losses of unit rows `[N, p]` with labels `[N]` or `[N, C]`."""
        raise NotImplementedError

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config.resolve(Facts(0, classes, 0, 0, dim))
        projection = projection_head(
            dim, int(sizes.hidden), int(sizes.projection), norm=self.config.head_norm
        )
        return {
            "projection": Head(projection, reads="features", writes="projection"),
            "classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        views, share = self.config.views, self.config.contrast_share
        joint = self.config.mode == "joint"
        contrast = Stage(
            "joint" if joint else "contrast",
            1.0 if joint else share,
            ("projection", "classifier") if joint else ("projection",),
            views=views,
            coupled=True,
            positives=views == 1,
        )
        linear = Stage("linear", 1 - share, ("classifier",), freeze_backbone=True)
        return (contrast,) if joint else (contrast, linear)

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,
    ) -> Loss:
        if progress.stage == "linear":
            return combine(ce=(1.0, self._classification(batch, student)))
        features = unit(required(student.projection))
        losses = self.contrast(features, repeat_views(batch.labels, features))
        if progress.stage == "contrast":
            loss = combine(**{self.term: (1.0, losses)})
        else:
            ce = (1.0, self._classification(batch, student))
            loss = combine(ce=ce, **{self.term: (self.config.weight, losses)})
        return loss._replace(counts=lonely(losses))

    def _classification(self, batch: Batch, student: Outputs) -> PerAnchor:
        logits = required(student.logits)
        return self.classify(logits, repeat_views(batch.labels, logits))
