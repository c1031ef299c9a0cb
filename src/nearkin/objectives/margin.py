"""CosFace and ArcFace: cosines as logits, and a margin on one's own class in training."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from torch import Tensor

from nearkin.config import option
from nearkin.functional import PerAnchor, arcface_margin, cosface_margin
from nearkin.network import CosineClassifier, Head
from nearkin.objectives.base import Objective, combine, per_class, required
from nearkin.types import Batch, Loss, Outputs, Progress


class MarginSoftmax(Objective):
    """total = CE(scale * (cosines with the margin on one's own class)).

    A subclass gives `with_margin`. The head emits scale * cosine, so that evaluation uses the softmax
    without the margin (docs/decisions/008). A mixed image is computed for both of its classes.
    """

    two_classes = True

    class Config(Objective.Config):
        """Scales of 30 to 64 are usual for many classes."""

        scale: float = option(16.0, "of the cosines, before the softmax", gt=0)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """Logits `[N, C]` from cosines `[N, C]`, the margin applied at integer labels `[N]`."""
        raise NotImplementedError

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        classifier = CosineClassifier(dim, classes, self.config.scale)
        return {"classifier": Head(classifier, reads="features", writes="logits")}

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        cosine = required(student.logits) / self.config.scale

        def against(classes: Tensor) -> PerAnchor:
            return self.classify(self.with_margin(cosine, classes), classes)

        return combine(ce=(1.0, per_class(against, batch.labels)))


class ArcFace(MarginSoftmax, name="arcface"):
    """Softmax over cosines; the own class must win by a margin of the angle (arXiv 1801.07698)."""

    class Config(MarginSoftmax.Config):
        """The paper has 0.5 with scale 64."""

        margin: float = option(0.2, "radians added to the own angle", ge=0, lt=3.14)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        return arcface_margin(
            cosine, labels, margin=self.config.margin, scale=self.config.scale, validate=False
        )


class CosFace(MarginSoftmax, name="cosface"):
    """Softmax over cosines; the own class must win by a margin of the cosine (arXiv 1801.09414)."""

    class Config(MarginSoftmax.Config):
        """The paper has 0.35 with scale 64."""

        margin: float = option(0.2, "subtracted from the own cosine", ge=0, lt=2)

    config: Config

    def with_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        return cosface_margin(
            cosine, labels, margin=self.config.margin, scale=self.config.scale, validate=False
        )
