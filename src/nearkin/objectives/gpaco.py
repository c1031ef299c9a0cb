"""GPaCo, generalised parametric contrastive learning (Cui et al. 2023, arXiv 2209.12400)."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from typing import Literal, Self

import torch

from nearkin.bank import NeighbourBank
from nearkin.config import AutoCount, option
from nearkin.functional import SoftPairs, gpaco, soft_pairs
from nearkin.network import Head, Norm, projection_head, projection_sizes
from nearkin.objectives.base import (
    Attach,
    Objective,
    Stage,
    attach_option,
    attached,
    combine,
    default_attach,
    default_bank,
    required,
    unit,
)
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class GPaCo(Objective, name="gpaco"):
    """Class logits and same-class samples compete in one softmax, with a bank (arXiv 2209.12400).

    The anchors are the student's crops. They contrast with each other, with the teacher's keys of this batch and
    with the bank of earlier ones, in which an image's own copies are masked.
    Heads: a projection, and a linear classifier, side by side on the pooled features.
    """

    two_classes = True

    class Config(Objective.Config):
        """Alpha and temperature as published for ImageNet."""

        alpha: float = option(0.05, "weight of a sample beside that of the label", ge=0)
        temperature: float = option(0.2, "divides the cosine similarities", gt=0)
        bank: AutoCount = option("auto", "entries K of the bank")
        hidden: AutoCount = option("auto", "hidden width of the projection")
        projection: AutoCount = option("auto", "width of the projection")
        head_norm: Norm = option("batch", "in the projection: batch, layer or none")
        attach: Attach = attach_option()
        teacher_horizon: float = option(0.3, "memory of the teacher in epochs", gt=0)
        teacher_crop: Literal["same", "own"] = option(
            "own", "the teacher reads the student's crop, or one of its own"
        )

        def resolve(self, facts: Facts) -> Self:
            hidden, out = projection_sizes(facts.dim)
            return self.fill(
                bank=default_bank(facts),
                hidden=hidden,
                projection=out,
                attach=default_attach(facts),
            )

    config: Config
    bank: NeighbourBank

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        width = dim if sizes.attach == "features" else sizes.projection
        self.bank = NeighbourBank(sizes.bank, width)
        head = projection_head(dim, sizes.hidden, sizes.projection, norm=sizes.head_norm)
        rows = attached(sizes.attach, head)
        return {"projection": Head(rows, "features", "projection")} | super().build(dim, classes)

    def stages(self) -> tuple[Stage, ...]:
        crop = self.config.teacher_crop
        policy = TeacherPolicy(horizon=self.config.teacher_horizon, crop=crop)
        views = 2 if crop == "own" else 1
        heads = ("projection", "classifier")
        stage = Stage("joint", 1.0, heads, views=views, teacher=policy, coupled=True, pairs="class")
        return (stage,)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
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

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:
        keys = unit(required(teacher, "projection"))
        self.bank.write(keys, batch.labels, None, batch.index)
