"""GPaCo, generalised parametric contrastive learning (Cui et al. 2023, arXiv 2209.12400)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import nn

from nearkin.bank import NeighbourBank
from nearkin.config import Auto, Count
from nearkin.functional import SoftPairs, gpaco, soft_pairs
from nearkin.network import Head, Norm, projection_head, projection_sizes
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    required,
    unit,
    usual_bank,
)
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class GPaCo(Objective, name="gpaco"):
    """Class logits and same-class samples compete in one softmax, with a bank (arXiv 2209.12400).

    The anchors are the student's crops. They contrast with each other, with the teacher's keys of this batch and
    with the bank of earlier ones, in which an image's own copies are masked.
    Heads: a projection, and a linear classifier, side by side on the pooled features.
    """

    class Config(Objective.Config):
        """Alpha and temperature as published for ImageNet; smoothing, bank and teacher are our choice."""

        alpha: float = Field(0.05, ge=0, description="weight of a sample beside that of the label")
        temperature: float = Field(0.2, gt=0, description="divides the cosine similarities")
        bank: Count | Auto = Field("auto", description="entries K of the bank")
        hidden: Count | Auto = Field("auto", description="hidden width of the projection")
        projection: Count | Auto = Field("auto", description="width of the projection")
        head_norm: Norm = Field("batch", description="in the projection: batch, layer or none")
        teacher_horizon: float = Field(0.3, gt=0, description="memory of the teacher in epochs")
        teacher_crop: Literal["same", "own"] = Field(
            "own", description="the teacher reads the student's crop, or one of its own"
        )

        def resolve(self, facts: Facts) -> Self:
            hidden, out = projection_sizes(facts.dim)
            values = {"bank": usual_bank(facts), "hidden": hidden, "projection": out}
            update = {k: v for k, v in values.items() if getattr(self, k) == "auto"}
            return self.model_copy(update=update)

    config: Config
    bank: NeighbourBank

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        if self.config.bank == "auto":
            raise ValueError("GPaCo needs numbers: give bank, or call Config.resolve(facts).")
        sizes = self.config.resolve(Facts(0, classes, 0, 0, dim))
        self.bank = NeighbourBank(int(sizes.bank), int(sizes.projection))
        projection = projection_head(
            dim, int(sizes.hidden), int(sizes.projection), norm=self.config.head_norm
        )
        return {
            "projection": Head(projection, reads="features", writes="projection"),
            "classifier": Head(nn.Linear(dim, classes), reads="features", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        crop = self.config.teacher_crop
        policy = TeacherPolicy(horizon=self.config.teacher_horizon, crop=crop)
        views = 2 if crop == "own" else 1
        heads = ("projection", "classifier")
        return (Stage("joint", 1.0, heads, views=views, teacher=policy, coupled=True),)

    def forward(
        self,
        batch: Batch,
        student: Outputs,
        teacher: Outputs | None,
        progress: Progress,  # noqa: ARG002
    ) -> Loss:
        keys = unit(required(teacher, "projection")).detach()
        now = soft_pairs(batch.labels, validate=False)
        usable = self.bank.usable(batch.index)
        losses = gpaco(
            unit(required(student.projection)),
            batch.labels,
            required(student.logits),
            torch.cat([keys, self.bank.keys]),
            SoftPairs(*(torch.cat(both) for both in zip(now, self.bank.pairs, strict=True))),
            alpha=self.config.alpha,
            temperature=self.config.temperature,
            smoothing=self.config.smoothing,
            mask=torch.cat([torch.ones_like(usable[:, :1]).expand(-1, len(keys)), usable], 1),
            validate=False,
        )
        return combine(gpaco=(1.0, self.weigh(losses, batch.labels)))

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:  # noqa: ARG002
        keys = unit(required(teacher, "projection"))
        self.bank.write(keys, batch.labels, None, batch.index)
