"""CoNe, Contrast Your Neighbours (arXiv 2308.10761)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nearkin.bank import NeighbourBank, bank_precision
from nearkin.config import Auto, Count, Natural
from nearkin.functional import PerAnchor, consistency_kl
from nearkin.functional._bank_attention import bank_attention
from nearkin.network import Head, projection_head, projection_sizes
from nearkin.objectives.base import (
    Objective,
    Stage,
    combine,
    probabilities,
    required,
    unit,
    usual_bank,
)
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

CERTAIN = 1e-8


class CoNe(Objective, name="cone"):
    """Class centre, neighbours in a bank, and their distributional consistency (arXiv 2308.10761).

    total = CE + neighbour_weight * L_neighbour + consistency_weight * L_consistency, after a warm-up on CE.
    Both terms are attention over a bank of the teacher's keys: L_neighbour is minus the log of the attention mass
    on one's own class, L_consistency the divergence from the neighbours' class probabilities. The student's
    embedding e feeds the classifier, z = e / |e| the contrast; the teacher gives keys and probabilities. An image's
    own earlier copies are masked. Inference needs neither bank nor teacher. Equations: docs/methods/cone.md.
    """

    class Config(Objective.Config):
        """Weights and temperatures as published; sizes, warm-up and teacher memory are our choice."""

        neighbour_weight: float = Field(0.7, ge=0, description="weight of the neighbour term")
        consistency_weight: float = Field(0.4, ge=0, description="weight of the consistency term")
        neighbour_temperature: float = Field(0.10, gt=0, description="of the k neighbours")
        consistency_temperature: float = Field(0.07, gt=0, description="of the whole bank")
        bank: Count | Auto = Field("auto", description="entries K of the bank")
        bank_precision: Literal["auto", "bf16", "exact"] = Field(
            "auto", description="of its keys and probabilities; auto: bf16 where it is fast"
        )
        topk: Count | Auto = Field("auto", description="neighbours k per anchor")
        warmup_steps: Natural | Auto = Field(
            "auto", description="steps on cross-entropy alone; auto: until the bank is full"
        )
        guard: bool = Field(
            False, description="published code: no CE, no consistency for certain samples"
        )
        hidden: Count | Auto = Field("auto", description="hidden width of the projection")
        embedding: Count | Auto = Field("auto", description="width of the embedding")
        teacher_schedule: Literal["constant", "cosine"] = Field(
            "constant", description="momentum constant, or the paper's cosine to 1"
        )
        teacher_horizon: float = Field(0.3, gt=0, description="memory in epochs (constant)")
        teacher_momentum: float = Field(0.996, ge=0, lt=1, description="at the start (cosine)")
        teacher_batchnorm: Literal["own", "average"] = Field(
            "own", description="the teacher's own statistics, or the student's averaged"
        )
        teacher_crop: Literal["same", "own"] = Field(
            "same", description="the teacher reads the student's crop, or one of its own"
        )

        def resolve(self, facts: Facts) -> CoNe.Config:
            """K = min(65 536, N / 2), at least a batch; k = min(K / 4, clamp(8 K / C, 32, 512))."""
            hidden, embedding = projection_sizes(facts.dim)
            bank = usual_bank(facts) if self.bank == "auto" else self.bank
            topk = max(1, min(bank // 4, min(max(8 * bank // facts.classes, 32), 512)))
            fill = min(bank, facts.images)
            values = {
                "bank": bank,
                "topk": topk,
                "warmup_steps": -(-fill // max(facts.batch_size, 1)),
                "hidden": hidden,
                "embedding": embedding,
                "bank_precision": bank_precision(torch.device(facts.device)),
            }
            update = {k: v for k, v in values.items() if getattr(self, k) == "auto"}
            return self.model_copy(update=update)

    config: Config
    bank: NeighbourBank

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        if "auto" in (sizes.bank, sizes.topk, sizes.warmup_steps):
            raise ValueError(
                "CoNe needs numbers: give bank, topk and warmup_steps, or call Config.resolve(facts)."
            )
        sizes = sizes.resolve(Facts(0, classes, 0, 0, dim))
        storage = torch.float32 if sizes.bank_precision == "exact" else torch.bfloat16
        self.bank = NeighbourBank(int(sizes.bank), int(sizes.embedding), classes, storage)
        projection = projection_head(dim, int(sizes.hidden), int(sizes.embedding))
        classifier = nn.Linear(int(sizes.embedding), classes)
        return {
            "projection": Head(projection, reads="features", writes="embedding"),
            "classifier": Head(classifier, reads="embedding", writes="logits"),
        }

    def stages(self) -> tuple[Stage, ...]:
        policy = TeacherPolicy(
            schedule=self.config.teacher_schedule,
            horizon=self.config.teacher_horizon,
            momentum=self.config.teacher_momentum,
            batchnorm=self.config.teacher_batchnorm,
            crop=self.config.teacher_crop,
        )
        views = 2 if policy.crop == "own" else 1
        return (
            Stage("neighbours", 1.0, ("projection", "classifier"), views=views, teacher=policy),
        )

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits = required(student.logits)
        ce = self.classify(logits, batch.labels)
        if progress.step < int(self.config.warmup_steps) or teacher is None:
            loss = combine(ce=(1.0, ce))
            zero = torch.zeros_like(loss.total.detach())
            return loss._replace(terms=loss.terms | {"neighbour": zero, "consistency": zero})
        neighbour, target = bank_attention(
            unit(student.embedding),
            unit(teacher.embedding),
            batch.labels,
            batch.index,
            self.bank.memory,
            query_temperature=self.config.neighbour_temperature,
            key_temperature=self.config.consistency_temperature,
            topk=int(self.config.topk),
        )
        consistency = consistency_kl(logits, target, validate=False)
        if self.config.guard:
            unsure = logits.detach().float().softmax(1).amin(1) > CERTAIN
            ce, consistency = _only(ce, unsure), _only(consistency, unsure)
        return combine(
            ce=(1.0, ce),
            neighbour=(self.config.neighbour_weight, neighbour),
            consistency=(self.config.consistency_weight, consistency),
        )

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:  # noqa: ARG002
        if teacher is None:
            raise ValueError("CoNe fills its bank from the teacher; give its outputs.")
        logits = required(teacher.logits)
        self.bank.write(unit(teacher.embedding), batch.labels, probabilities(logits), batch.index)


def _only(losses: PerAnchor, kept: Tensor) -> PerAnchor:
    """The losses of the kept anchors; the others count with the value 0, as in the published code."""
    return PerAnchor(losses.value.where(kept, torch.zeros_like(losses.value)), losses.valid)
