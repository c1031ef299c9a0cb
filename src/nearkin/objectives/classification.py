"""Cross-entropy, the baseline, and its symmetric form (Wang et al. 2019, arXiv 1908.06112)."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from typing import Literal, Self

from torch import nn

from nearkin.config import AutoAmount, option
from nearkin.functional import binary_cross_entropy, symmetric_ce
from nearkin.network import Head, projection_head, projection_sizes
from nearkin.objectives.base import Objective, Stage, combine, required, smoothed
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

FEW_CLASSES = 30  # between the two published presets of the symmetric form


class CrossEntropy(Objective, name="ce"):
    """Cross-entropy of a softmax, or binary per class: the baseline (arXiv 2110.00476).

    total = CE(logits, labels). Heads: one linear classifier on the pooled features, or on the embedding of cone's
    projection, which shows how much of a gain the head alone would give.
    """

    class Config(Objective.Config):
        """The binary form is that of timm's A1 to A3 recipes."""

        loss: Literal["softmax", "bce"] = option(
            "softmax", "classes compete, or each is a yes-or-no question"
        )
        classifier: Literal["features", "embedding"] = option(
            "features",
            "what it reads: the features, or the embedding of a projection, as in the published CoNe",
        )

    config: Config

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        if self.config.classifier == "features":
            return super().build(dim, classes)
        hidden, width = projection_sizes(dim)
        return {
            "projection": Head(projection_head(dim, hidden, width), "features", "embedding"),
            "classifier": Head(nn.Linear(width, classes), reads="embedding", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("classify", 1.0, heads=tuple(self.heads)),)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits = required(student.logits)
        if self.config.loss == "softmax":
            return combine(ce=(1.0, self.classify(logits, batch.labels)))
        losses = binary_cross_entropy(
            logits,
            batch.labels,
            smoothing=self.config.smoothing,
            class_weights=self.class_weights,
            validate=False,
        )
        return combine(bce=(1.0, losses))


def preset(classes: int) -> tuple[float, float]:
    """(alpha, beta): the published pairs for about 10 and about 100 classes, divided by alpha where it exceeds 1.

    Alpha 6 would multiply the step size by 6 (docs/methods/sce.md).
    """
    return (0.1, 1.0) if classes <= FEW_CLASSES else (1.0, 0.1 / 6)


class SymmetricCE(Objective, name="sce"):
    """Cross-entropy plus its reverse, which tolerates wrong labels (arXiv 1908.06112).

    total = alpha * CE + beta * RCE. Heads: one linear classifier on the pooled features.
    """

    class Config(Objective.Config):
        """`auto` is the published preset for the number of classes, see `preset`."""

        alpha: AutoAmount = option("auto", "weight of the cross-entropy")
        beta: AutoAmount = option("auto", "weight of the reverse cross-entropy")

        def resolve(self, facts: Facts) -> Self:
            alpha, beta = preset(facts.classes)
            return self.fill(alpha=alpha, beta=beta)

    config: Config

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits = required(student.logits)
        labels = smoothed(batch.labels, logits.shape[1], self.config.smoothing, logits.dtype)
        alpha, beta = self.config.alpha, self.config.beta
        losses = symmetric_ce(logits, labels, alpha=alpha, beta=beta, validate=False)
        return combine(sce=(1.0, self.weigh(losses, batch.labels)))
