"""Symmetric cross-entropy (Wang et al. 2019, arXiv 1908.06112)."""

from __future__ import annotations

from typing import Self

from nearkin.config import AutoAmount, option
from nearkin.functional import symmetric_ce
from nearkin.objectives.base import Objective, combine, required, smoothed
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

FEW_CLASSES = 30  # between the two published presets


def preset(classes: int) -> tuple[float, float]:
    """(alpha, beta): the published pairs for about 10 and about 100 classes, divided by alpha where it exceeds 1.

    Alpha 6 would multiply the step size by 6 (docs/methods/sce.md).
    """
    return (0.1, 1.0) if classes <= FEW_CLASSES else (1.0, 0.1 / 6)


class SymmetricCE(Objective, name="sce"):
    """Cross-entropy plus its reverse, which bears wrong labels (arXiv 1908.06112).

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
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        logits = required(student.logits)
        labels = smoothed(batch.labels, logits.shape[1], self.config.smoothing)
        alpha, beta = self.config.alpha, self.config.beta
        losses = symmetric_ce(logits, labels, alpha=alpha, beta=beta, validate=False)
        return combine(sce=(1.0, self.weigh(losses, batch.labels)))
