"""Attract-and-Repulse (arXiv 2206.06168)."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

import math
from typing import Literal, Self

from nearkin.bank import NeighbourBank
from nearkin.config import AutoCount, Count, option
from nearkin.functional import (
    PerAnchor,
    consistency_kl,
    instance_nce_bank,
    supcon_out,
    symmetric_ce,
)
from nearkin.network import Head, Norm, projection_head
from nearkin.objectives.base import (
    Attach,
    Objective,
    Stage,
    attach_option,
    attached,
    combine,
    default_attach,
    default_bank,
    probabilities,
    repeat_views,
    required,
    smoothed,
    unit,
)
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class AttractRepulse(Objective, name="attract-repulse"):
    """Symmetric CE attracts, instance contrast repulses; then a Mean Teacher (arXiv 2206.06168).

    contrast:     total = SCE + repulse(t) * CR. CR is instance discrimination: other images of the class are
                  negatives too. repulse falls from `repulse` to `repulse_end` by a cosine.
    mean-teacher: total = SCE + consistency(t) * KL(teacher || student), on another crop; student and teacher start
                  from the best weights so far, consistency rises as exp(-5 (1 - t)^2), the teacher is the final model.
    The paper publishes no formulas, weights or backbones; docs/methods/attract-repulse.md explains the numbers.
    Heads: a two-layer projection, and a linear classifier, side by side on the pooled features.
    """

    class Config(Objective.Config):
        """No value is published; sources of the parts: docs/methods/attract-repulse.md."""

        # The pair published for many classes (6, 0.1), divided by 6: that for few harms long training on clean labels
        # (docs/decisions/009-stage-two-of-attract-repulse.md).
        alpha: float = option(1.0, "weight of the cross-entropy", ge=0)
        beta: float = option(0.0167, "weight of the reverse cross-entropy", ge=0)
        repulse: float = option(0.1, "weight of the instance contrast at the start", ge=0)
        repulse_end: float = option(0.0, "the same at the stage's end", ge=0)
        trade_off: Literal["cosine", "constant"] = option(
            "cosine", "how the weight goes from start to end; constant stays"
        )
        negatives: Literal["batch", "bank"] = option(
            "batch", "other images of the batch, or a bank of teacher keys"
        )
        temperature: float = option(0.2, "divides the cosine similarities", gt=0)
        bank: AutoCount = option("auto", "entries K of the bank")
        projection: Count = option(128, "width of the projection")
        head_norm: Norm = option("batch", "in the projection: batch, layer or none")
        attach: Attach = attach_option()
        contrast_share: float = option(
            0.7, "share of the epochs before the Mean Teacher", gt=0, lt=1
        )
        consistency: float = option(1.0, "weight of the teacher's targets", ge=0)
        ramp_epochs: float = option(
            5.0, "over which that weight rises, at most those of the stage", gt=0
        )
        teacher_memory: float = option(
            0.1, "memory of the teacher, as a share of its stage", gt=0, le=1
        )
        teacher_schedule: Literal["constant", "ramped"] = option(
            "constant", "its momentum constant, or ramped up from 0 as in Mean Teacher"
        )
        teacher_lr: float = option(0.1, "peak of the second stage, as a share of --lr", gt=0, le=1)

        def resolve(self, facts: Facts) -> Self:
            return self.fill(bank=default_bank(facts), attach=default_attach(facts))

    config: Config
    bank: NeighbourBank

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        if sizes.negatives == "bank":
            width = dim if sizes.attach == "features" else sizes.projection
            self.bank = NeighbourBank(sizes.bank, width)
        head = projection_head(dim, dim, sizes.projection, norm=sizes.head_norm)
        rows = attached(sizes.attach, head)
        return {"projection": Head(rows, "features", "projection")} | super().build(dim, classes)

    def stages(self) -> tuple[Stage, ...]:
        share, memory = self.config.contrast_share, self.config.teacher_memory
        in_batch = self.config.negatives == "batch"
        keys = None if in_batch else TeacherPolicy(share=memory, crop="own")
        averaged = TeacherPolicy(
            schedule=self.config.teacher_schedule,
            share=memory,
            batchnorm="average",
            crop="own",
        )
        heads = ("projection", "classifier")
        return (
            Stage("contrast", share, heads, views=2, teacher=keys, coupled=in_batch, pairs="crops"),
            Stage(
                "mean-teacher",
                1 - share,
                ("classifier",),
                start="best",
                views=2,
                teacher=averaged,
                lr=self.config.teacher_lr,
                final="teacher",
            ),
        )

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        sce = (1.0, self._attract(batch, student))
        if progress.stage == "contrast":
            contrast = self._repulse(batch, student, teacher)
            return combine(sce=sce, repulse=(self._repulsion(progress), contrast))
        target = probabilities(required(teacher, "logits"))
        consistency = consistency_kl(required(student.logits), target, validate=False)
        return combine(sce=sce, consistency=(self._trust(progress), consistency))

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:
        keys = teacher.projection if teacher is not None else None
        if self.config.negatives == "bank" and keys is not None:
            self.bank.write(unit(keys), batch.labels, None, batch.index)

    def _attract(self, batch: Batch, student: Outputs) -> PerAnchor:
        logits = required(student.logits)
        labels = repeat_views(batch.labels, logits)
        losses = symmetric_ce(
            logits,
            smoothed(labels, logits.shape[1], self.config.smoothing, logits.dtype),
            alpha=self.config.alpha,
            beta=self.config.beta,
            validate=False,
        )
        return self.weigh(losses, labels)

    def _repulse(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> PerAnchor:
        rows, temperature = unit(required(student.projection)), self.config.temperature
        if self.config.negatives == "batch":
            # `instance_nce`, in which all crops of an image are positives where it is there more than once.
            images = batch.index if batch.index.ndim == 1 else batch.index[:, 0]
            return supcon_out(rows, images.repeat(2), temperature=temperature, validate=False)
        keys, mask = unit(required(teacher, "projection")), self.bank.usable(batch.index)
        return instance_nce_bank(
            rows, keys, self.bank.keys, temperature=temperature, mask=mask, validate=False
        )

    def _repulsion(self, progress: Progress) -> float:
        """w(t) = end + (start - end)(1 + cos(pi t)) / 2, t the share of the stage that is done."""
        start, end = self.config.repulse, self.config.repulse_end
        if self.config.trade_off == "constant":
            return start
        done = progress.step / max(1, progress.steps)
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2

    def _trust(self, progress: Progress) -> float:
        """w(t) = consistency * exp(-5 (1 - t)^2), t the share of the ramp that is done (Tarvainen and Valpola 2017)."""
        epochs = progress.step * progress.epochs / max(1, progress.steps)
        done = min(1.0, epochs / min(self.config.ramp_epochs, max(1, progress.epochs)))
        return self.config.consistency * math.exp(-5 * (1 - done) ** 2)
