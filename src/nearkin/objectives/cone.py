"""CoNe, Contrast Your Neighbours (arXiv 2308.10761)."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

import math
from typing import Literal, Self

import torch
from torch import Tensor, nn

from nearkin.bank import NeighbourBank
from nearkin.config import AutoAmount, AutoCount, AutoNatural, option
from nearkin.functional import PerAnchor, consistency_kl
from nearkin.functional._bank_attention import bank_attention, multiplies_bf16
from nearkin.network import Head, projection_head, projection_sizes
from nearkin.objectives.base import (
    Attach,
    Attention,
    Objective,
    Stage,
    attach_option,
    attached,
    combine,
    default_attach,
    default_bank,
    probabilities,
    required,
    unit,
)
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

CERTAIN = 1e-8
FEW_CLASSES = 30  # between 10, where a heavier neighbour term was better, and 100, where it was not


class CoNe(Objective, name="cone"):
    """Cross-entropy; near images of the class attract, and vote on the answer (arXiv 2308.10761).

    total = CE + neighbour_weight * L_neighbour + consistency_weight * L_consistency, after a warm-up on CE.
    Both terms are attention over a bank of the teacher's keys: L_neighbour is minus the log of the attention mass
    on one's own class, L_consistency the divergence from the neighbours' class probabilities. The student's
    embedding e at unit length is z, which is contrasted; the classifier reads the features, or e as published. The
    teacher gives keys and probabilities. An image's own earlier copies are masked. Inference needs neither bank nor
    teacher. Equations: docs/methods/cone.md.
    """

    two_classes = True

    class Config(Objective.Config):
        """Temperatures as published; other defaults: docs/methods/cone.md."""

        neighbour_weight: AutoAmount = option("auto", "weight of the neighbour term")
        consistency_weight: AutoAmount = option("auto", "weight of the consistency term")
        neighbour_temperature: float = option(0.1, "of the k neighbours", gt=0)
        consistency_temperature: float = option(0.07, "of the whole bank", gt=0)
        bank: AutoCount = option("auto", "entries K of the bank")
        bank_precision: Literal["auto", "bf16", "exact"] = option(
            "auto", "of its keys and probabilities; auto: bf16 where it is fast"
        )
        topk: AutoCount = option("auto", "neighbours k per anchor")
        warmup_steps: AutoNatural = option(
            "auto", "steps on cross-entropy alone; auto: until the bank is full"
        )
        guard: bool = option(False, "published code: no CE, no consistency for certain samples")
        hidden: AutoCount = option("auto", "hidden width of the projection")
        embedding: AutoCount = option("auto", "width of the embedding")
        attach: Attach = attach_option()
        classifier: Literal["features", "embedding"] = option(
            "features", "what it reads: the features, or the embedding as published"
        )
        teacher_schedule: Literal["constant", "cosine"] = option(
            "constant", "momentum constant, or the paper's cosine to 1"
        )
        teacher_horizon: float = option(0.3, "memory in epochs (constant)", gt=0)
        teacher_momentum: float = option(0.996, "at the start (cosine)", ge=0, lt=1)
        teacher_batchnorm: Literal["own", "average"] = option(
            "own", "the teacher's own statistics, or the student's averaged"
        )
        teacher_crop: Literal["auto", "same", "own"] = option(
            "auto", "the teacher reads the student's crop, or one of its own"
        )

        def resolve(self, facts: Facts) -> Self:
            """K = min(65 536, N / 2), at least a batch; k = min(K / 4, clamp(8 K / C, 32, 512))."""
            hidden, embedding = projection_sizes(facts.dim)
            few = facts.classes <= FEW_CLASSES
            sized = self.fill(
                bank=default_bank(facts),
                hidden=hidden,
                embedding=embedding,
                attach=default_attach(facts),
                neighbour_weight=1.5 if few and not facts.pretrained else 0.7,
                consistency_weight=0.4 if facts.pretrained else 1.0,
                teacher_crop="same" if facts.pretrained else "own",
            )
            wanted = min(max(8 * sized.bank // facts.classes, 32), 512)
            # Where the hardware does not multiply bf16, casts make it slower: 395 ms at 65 536 entries, exact 283.
            fast = multiplies_bf16(torch.device(facts.device))
            return sized.fill(
                topk=max(1, min(sized.bank // 4, wanted)),
                warmup_steps=min(
                    math.ceil(sized.bank / facts.batch_size),
                    max(1, facts.images // facts.batch_size),
                ),
                bank_precision="bf16" if fast else "exact",
            )

    config: Config
    bank: NeighbourBank

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        storage = torch.float32 if sizes.bank_precision == "exact" else torch.bfloat16
        width = dim if sizes.attach == "features" else sizes.embedding
        self.bank = NeighbourBank(sizes.bank, width, classes, storage)
        projection = projection_head(dim, sizes.hidden, sizes.embedding)
        reads: Literal["features", "embedding"] = "embedding"
        if "features" in (
            sizes.attach,
            sizes.classifier,
        ):  # with `attach features` they are the same rows
            reads, width = "features", dim
        return {
            "projection": Head(attached(sizes.attach, projection), "features", "embedding"),
            "classifier": Head(nn.Linear(width, classes), reads=reads, writes="logits"),
        }

    def attention(self) -> Attention:
        """That of the neighbour term."""
        return Attention(self.config.neighbour_temperature, self.config.topk)

    def stages(self) -> tuple[Stage, ...]:
        policy = TeacherPolicy(
            schedule=self.config.teacher_schedule,
            horizon=self.config.teacher_horizon,
            momentum=self.config.teacher_momentum,
            batchnorm=self.config.teacher_batchnorm,
            crop="own" if self.config.teacher_crop == "own" else "same",
        )
        views = 2 if policy.crop == "own" else 1
        heads = ("projection", "classifier")
        return (Stage("neighbours", 1.0, heads, views=views, teacher=policy, pairs="bank"),)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        logits = required(student.logits)
        ce = self.classify(logits, batch.labels)
        if progress.step < self.config.warmup_steps:
            loss = combine(ce=(1.0, ce))
            if student.embedding is not None:
                # Where the classifier reads the features: several processes wait for each weight's gradient.
                # The sum of half-precision rows would overflow.
                rows = student.embedding.to(
                    torch.promote_types(student.embedding.dtype, torch.float32)
                )
                loss = loss._replace(total=loss.total + 0.0 * rows.sum())
            zero = torch.zeros_like(loss.total.detach())
            return loss._replace(terms=loss.terms | {"neighbour": zero, "consistency": zero})
        neighbour, target = bank_attention(
            unit(student.embedding),
            unit(required(teacher, "embedding")),
            batch.labels,
            batch.index,
            self.bank.memory,
            query_temperature=self.config.neighbour_temperature,
            key_temperature=self.config.consistency_temperature,
            topk=self.config.topk,
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

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:
        if teacher is None:
            raise ValueError("CoNe fills its bank from the teacher; give its outputs.")
        logits = required(teacher.logits)
        self.bank.write(unit(teacher.embedding), batch.labels, probabilities(logits), batch.index)


def _only(losses: PerAnchor, kept: Tensor) -> PerAnchor:
    """The losses of the kept anchors; the others count with the value 0, as in the published code."""
    return PerAnchor(losses.value.where(kept, torch.zeros_like(losses.value)), losses.valid)
