"""Cross-entropy: the opponent that every other objective has to beat."""

from __future__ import annotations

from torch import nn

from nearkin.functional import mean_valid
from nearkin.network import Head
from nearkin.objectives.base import Objective, Stage, repeat_views, required
from nearkin.types import Batch, Loss, Outputs, Progress


class CrossEntropy(Objective, name="ce"):
    """total = CE(logits, labels), with label smoothing, soft targets and class weights.

    Heads: one linear classifier on the pooled features.
    """

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        return {"classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits")}

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("classify", 1.0, heads=("classifier",)),)

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        logits = required(student.logits)
        total = mean_valid(self.classify(logits, repeat_views(batch.labels, logits)))
        return Loss(total, {"ce": total.detach()})
