"""Batch-hard triplets (Hermans et al. 2017, arXiv 1703.07737)."""

from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, triplet_batch_hard
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    lonely,
    per_class,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Loss, Outputs, Progress


class Triplet(Objective, name="triplet"):
    """The farthest image of the class nearer than any of another, by a margin (arXiv 1703.07737).

    total = CE + weight * batch-hard triplet loss of the pooled features, scaled to unit length.
    Heads: one linear classifier on the pooled features. A mixed image is computed for both of its classes.
    """

    class Config(Objective.Config):
        """One crop per image, as published; the margin is for unit rows."""

        weight: float = option(1.0, "weight of the triplet term", ge=0)
        margin: float = option(0.2, "least difference of the two distances", ge=0)
        views: int = option(1, "crops per image", ge=1, le=8)

    config: Config

    def stages(self) -> tuple[Stage, ...]:
        views = self.config.views
        return (
            Stage("joint", 1.0, ("classifier",), views=views, coupled=True, positives=views == 1),
        )

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        logits, features = required(student.logits), unit(student.features)
        labels = repeat_views(batch.labels, logits)

        def hard(classes: Tensor) -> PerAnchor:
            return triplet_batch_hard(features, classes, margin=self.config.margin, validate=False)

        losses = per_class(hard, labels)
        ce = self.classify(logits, labels)
        loss = combine(ce=(1.0, ce), triplet=(self.config.weight, losses))
        return loss._replace(counts=lonely(losses))
