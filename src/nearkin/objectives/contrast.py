"""Base of the contrastive objectives: a projection for the contrast, beside a linear classifier."""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor

from nearkin.config import AutoCount, option
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

        mode: Literal["joint", "two-stage"] = option(
            "joint", "with cross-entropy at once, or contrast first and then a classifier"
        )
        weight: float = option(0.5, "weight of the contrastive term (joint)", ge=0)
        temperature: float = option(0.1, "divides the cosine similarities", gt=0)
        views: int = option(2, "crops per image", ge=1, le=8)
        contrast_share: float = option(
            0.8, "share of the epochs that contrast (two-stage)", gt=0, lt=1
        )
        hidden: AutoCount = option("auto", "hidden width of the projection")
        projection: AutoCount = option("auto", "width of the projection")
        head_norm: Norm = option("batch", "in the projection: batch, layer or none")

        def resolve(self, facts: Facts) -> Self:
            hidden, out = projection_sizes(facts.dim)
            return self.fill(hidden=hidden, projection=out)

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        """The contrastive losses of unit rows `[N, p]` with labels `[N]` or `[N, C]`."""
        raise NotImplementedError

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        head = projection_head(dim, sizes.hidden, sizes.projection, norm=sizes.head_norm)
        projection = Head(head, reads="features", writes="projection")
        return {"projection": projection} | super().build(dim, classes)

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
