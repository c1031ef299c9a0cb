"""Attract-and-Repulse (arXiv 2206.06168)."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field
from torch import nn

from nearkin.bank import NeighbourBank
from nearkin.config import Amount, Auto, Count
from nearkin.functional import (
    PerAnchor,
    consistency_kl,
    instance_nce,
    instance_nce_bank,
    symmetric_ce,
)
from nearkin.network import Head, Norm, projection_head
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    probabilities,
    repeat_views,
    required,
    smoothed,
    unit,
    usual_bank,
)
from nearkin.objectives.sce import preset
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class AttractRepulse(Objective, name="attract-repulse"):
    """Symmetric CE attracts, instance contrast repulses; then a Mean Teacher (arXiv 2206.06168).

    contrast:     total = SCE + repulse(t) * CR. CR is instance discrimination: other images of the class are
                  negatives too. repulse falls from `repulse` to `repulse_end` by a cosine.
    mean-teacher: total = SCE + consistency(t) * KL(teacher || student), on another crop; student and teacher start
                  from the best weights so far, consistency rises as exp(-5 (1 - t)^2), the teacher is the final model.
    The paper publishes no formulas, weights or backbones: this composition and its numbers are our choice.
    Heads: a two-layer projection, and a linear classifier, side by side on the pooled features.
    """

    class Config(Objective.Config):
        """Our choice; the pieces' own sources are in docs/methods."""

        alpha: Amount | Auto = Field("auto", description="weight of the cross-entropy")
        beta: Amount | Auto = Field("auto", description="weight of the reverse cross-entropy")
        repulse: float = Field(
            1.0, ge=0, description="weight of the instance contrast at the start"
        )
        repulse_end: float = Field(0.1, ge=0, description="the same at the stage's end")
        trade_off: Literal["cosine", "constant"] = Field(
            "cosine", description="how the weight goes from start to end; constant stays"
        )
        negatives: Literal["batch", "bank"] = Field(
            "batch", description="other images of the batch, or a bank of teacher keys"
        )
        temperature: float = Field(0.2, gt=0, description="divides the cosine similarities")
        bank: Count | Auto = Field("auto", description="entries K of the bank")
        projection: Count = Field(128, description="width of the projection")
        head_norm: Norm = Field("batch", description="in the projection: batch, layer or none")
        contrast_share: float = Field(
            0.7, gt=0, lt=1, description="share of the epochs before the Mean Teacher"
        )
        consistency: float = Field(1.0, ge=0, description="weight of the teacher's targets")
        ramp_epochs: float = Field(5.0, gt=0, description="over which that weight rises")
        teacher_horizon: float = Field(2.0, gt=0, description="memory of the teacher in epochs")
        teacher_schedule: Literal["constant", "ramped"] = Field(
            "constant", description="its momentum constant, or ramped up from 0 as in Mean Teacher"
        )
        teacher_lr: float = Field(
            0.1, gt=0, le=1, description="peak of the second stage, as a share of --lr"
        )

        def resolve(self, facts: Facts) -> Self:
            # The published weight 0.1 of CE is for long training on noisy labels (docs/decisions/009).
            beta = preset(facts.classes)[1]
            values = {"alpha": 1.0, "beta": beta, "bank": usual_bank(facts)}
            update = {k: v for k, v in values.items() if getattr(self, k) == "auto"}
            return self.model_copy(update=update)

    config: Config
    bank: NeighbourBank

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        if "auto" in (self.config.alpha, self.config.beta, self.config.bank):
            raise ValueError(
                "AttractRepulse needs numbers: give alpha, beta and bank, or call Config.resolve(facts)."
            )
        if self.config.negatives == "bank":
            self.bank = NeighbourBank(int(self.config.bank), self.config.projection)
        projection = projection_head(dim, dim, self.config.projection, norm=self.config.head_norm)
        return {
            "projection": Head(projection, reads="features", writes="projection"),
            "classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        share, horizon = self.config.contrast_share, self.config.teacher_horizon
        in_batch = self.config.negatives == "batch"
        keys = None if in_batch else TeacherPolicy(horizon=horizon, crop="own")
        averaged = TeacherPolicy(
            schedule=self.config.teacher_schedule,
            horizon=horizon,
            batchnorm="average",
            crop="own",
        )
        heads = ("projection", "classifier")
        return (
            Stage("contrast", share, heads, views=2, teacher=keys, coupled=in_batch),
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

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:  # noqa: ARG002
        if (
            self.config.negatives == "bank"
            and teacher is not None
            and teacher.projection is not None
        ):
            self.bank.write(unit(teacher.projection), batch.labels, None, batch.index)

    def _attract(self, batch: Batch, student: Outputs) -> PerAnchor:
        logits = required(student.logits)
        labels = repeat_views(batch.labels, logits)
        losses = symmetric_ce(
            logits,
            smoothed(labels, logits.shape[1], self.config.smoothing),
            alpha=float(self.config.alpha),
            beta=float(self.config.beta),
            validate=False,
        )
        return self.weigh(losses, labels)

    def _repulse(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> PerAnchor:
        rows, temperature = unit(required(student.projection)), self.config.temperature
        if self.config.negatives == "batch":
            return instance_nce(*rows.chunk(2), temperature=temperature, validate=False)
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
