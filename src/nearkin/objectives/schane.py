"""SCHaNe (arXiv 2308.14893; later CLCE, arXiv 2402.14551)."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from nearkin.config import AutoPart, AutoViews, Count, option
from nearkin.functional import PerAnchor, schane
from nearkin.network import Head, projection_head
from nearkin.objectives.base import (
    Attach,
    Objective,
    Stage,
    attach_option,
    attached,
    combine,
    default_attach,
    default_views,
    lonely,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class SCHaNe(Objective, name="schane"):
    """Supervised contrast with hard negatives, beside CE: for fine-tuning (arXiv 2308.14893).

    total = mix * L_schane + (1 - mix) * CE, over the embeddings and logits of independent crops.
    Heads: a projection without BatchNorm and a linear classifier, side by side on the pooled features.
    Two crops of an image are independent draws; the published code gives the same crop twice.
    """

    class Config(Objective.Config):
        """Defaults of the published code; `within` stands for its contrast on each device alone. Pretrained: what was
        best on held-out images of ours (docs/decisions/018-photos.md)."""

        mix: AutoPart = option(
            "auto",
            "share of the contrast in the total; auto: 0.5 if pretrained, else 0.9 as published",
        )
        hardness: float = option(1.0, "how much similar negatives count more", ge=0)
        temperature: float = option(0.5, "divides the cosine similarities", gt=0)
        positives: Literal["mean", "sum"] = option(
            "mean", "the positives' exponentials are averaged, or summed (CLCE)"
        )
        views: AutoViews = option(
            "auto",
            "crops per image; auto: 2 as published, 1 if pretrained and classes have 2 images or more on average",
        )
        within: Count | None = option(
            None, "contrast within blocks of so many images, not the whole batch"
        )
        projection: Count = option(128, "width of the projection")
        attach: Attach = attach_option()

        def resolve(self, facts: Facts) -> Self:
            mix = 0.5 if facts.pretrained else 0.9
            return self.fill(attach=default_attach(facts), views=default_views(facts), mix=mix)

    config: Config

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        head = projection_head(dim, dim, self.config.projection, norm="none")
        rows = attached(self.config.attach, head)
        return {"projection": Head(rows, "features", "projection")} | super().build(dim, classes)

    def stages(self) -> tuple[Stage, ...]:
        views = self.config.views
        heads = ("projection", "classifier")
        stage = Stage("joint", 1.0, heads, views=views, coupled=True, positives=views == 1)
        return (stage._replace(pairs="class", within=self.config.within),)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits, features = required(student.logits), unit(required(student.projection))
        labels = repeat_views(batch.labels, logits)
        losses = self._contrast(features, labels, images=len(batch.labels))
        ce = self.classify(logits, labels)
        loss = combine(ce=(1 - self.config.mix, ce), schane=(self.config.mix, losses))
        return loss._replace(counts=lonely(losses))

    def _contrast(self, features: Tensor, labels: Tensor, images: int) -> PerAnchor:
        """The losses of all rows, each contrasted with the rows of its block of images."""
        z, y = (rows.view(-1, images, *rows.shape[1:]) for rows in (features, labels))
        size = self.config.within or images
        blocks = [
            schane(
                z[:, start : start + size].flatten(0, 1),
                y[:, start : start + size].flatten(0, 1),
                temperature=self.config.temperature,
                hardness=self.config.hardness,
                positives=self.config.positives,
                validate=False,
            )
            for start in range(0, images, size)
        ]
        return PerAnchor(*(torch.cat(column) for column in zip(*blocks, strict=True)))
