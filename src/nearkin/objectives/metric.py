"""Losses on the geometry of the features: orthogonal projection and batch-hard triplets."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, orthogonal_projection, triplet_batch_hard
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
        views = self.config.views
        stage = Stage("joint", 1.0, ("classifier",), views=views, coupled=True, pairs="class")
        return (stage._replace(positives=views == 1),)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits = required(student.logits)
        labels = repeat_views(batch.labels, logits)
        opl = orthogonal_projection(
            unit(student.features), labels, gamma=self.config.gamma, validate=False
        )
        return combine(ce=(1.0, self.classify(logits, labels)), opl=(self.config.weight, opl))


class Triplet(Objective, name="triplet"):
    """The farthest image of a class nearer than any of another, by a margin (arXiv 1703.07737).

    total = CE + weight * batch-hard triplet loss of the pooled features, scaled to unit length.
    Heads: one linear classifier on the pooled features. A mixed image is computed for both of its classes.
    """

    two_classes = True

    class Config(Objective.Config):
        """One crop per image, as published; the margin is for unit rows."""

        weight: float = option(1.0, "weight of the triplet term", ge=0)
        margin: float = option(0.2, "least difference of the two distances", ge=0)
        views: int = option(1, "crops per image", ge=1, le=8)

    config: Config

    def stages(self) -> tuple[Stage, ...]:
        views = self.config.views
        stage = Stage("joint", 1.0, ("classifier",), views=views, coupled=True, pairs="class")
        return (stage._replace(positives=views == 1),)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits, features = required(student.logits), unit(student.features)
        labels = repeat_views(batch.labels, logits)

        def hard(classes: Tensor) -> PerAnchor:
            return triplet_batch_hard(features, classes, margin=self.config.margin, validate=False)

        losses = per_class(hard, labels)
        ce = self.classify(logits, labels)
        loss = combine(ce=(1.0, ce), triplet=(self.config.weight, losses))
        return loss._replace(counts=lonely(losses))
