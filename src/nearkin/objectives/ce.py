"""Cross-entropy: the baseline."""

from __future__ import annotations

from typing import Literal

from nearkin.config import option
from nearkin.functional import binary_cross_entropy
from nearkin.objectives.base import Objective, combine, required
from nearkin.types import Batch, Loss, Outputs, Progress


class CrossEntropy(Objective, name="ce"):
    """Cross-entropy of a softmax, or binary per class: the baseline (arXiv 2110.00476).

    total = CE(logits, labels). Heads: one linear classifier on the pooled features.
    """

    class Config(Objective.Config):
        """The binary form is that of timm's A1 to A3 recipes."""

        loss: Literal["softmax", "bce"] = option(
            "softmax", "classes compete, or each is a yes-or-no question"
        )

    config: Config

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
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
