"""The contrastive objectives: a projection for the contrast, beside a linear classifier."""

# ruff: noqa: ARG002 - the interface fixes the arguments of every objective
from __future__ import annotations

from typing import Literal, Self

from torch import Tensor

from nearkin.config import AutoCount, AutoViews, option
from nearkin.functional import PerAnchor, sincere, supcon_in, supcon_out, varcon
from nearkin.network import Head, Norm, projection_head, projection_sizes
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
    per_class,
    repeat_views,
    required,
    unit,
)
from nearkin.types import Batch, Facts, Loss, Outputs, Progress


class Contrastive(Objective):
    """joint: total = CE + weight * contrast. two-stage: the contrast alone, then CE on the frozen backbone.

    A subclass gives `contrast`, the losses of unit rows, and `term`, their name in the journal.
    Heads: a projection, and a linear classifier, side by side on the pooled features.
    """

    term: str

    class Config(Objective.Config):
        """Options of every contrastive objective; the weight of each is its own."""

        mode: Literal["joint", "two-stage"] = option(
            "joint", "with cross-entropy at once, or contrast first and then a classifier"
        )
        weight: float = option(0.5, "weight of the contrastive term (joint)", ge=0)
        temperature: float = option(0.1, "divides the cosine similarities", gt=0)
        views: AutoViews = option(
            "auto",
            "crops per image; auto: 1 if pretrained and classes have 2 images or more on average, else 2",
        )
        contrast_share: float = option(
            0.8, "share of the epochs that contrast (two-stage)", gt=0, lt=1
        )
        hidden: AutoCount = option("auto", "hidden width of the projection")
        projection: AutoCount = option("auto", "width of the projection")
        head_norm: Norm = option("batch", "in the projection: batch, layer or none")
        attach: Attach = attach_option()

        def resolve(self, facts: Facts) -> Self:
            hidden, out = projection_sizes(facts.dim)
            return self.fill(
                hidden=hidden,
                projection=out,
                views=default_views(facts),
                attach=default_attach(facts),
            )

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        """The contrastive losses of unit rows `[N, p]` with labels `[N]` or `[N, C]`."""
        raise NotImplementedError

    def losses(self, student: Outputs, labels: Tensor) -> PerAnchor:
        """The contrastive losses of the outputs; for a subclass that needs more of them than the unit rows."""
        return self.contrast(unit(required(student.projection)), labels)

    def build(self, dim: int, classes: int) -> dict[str, Head]:
        sizes = self.config
        head = projection_head(dim, sizes.hidden, sizes.projection, norm=sizes.head_norm)
        rows = attached(sizes.attach, head)
        return {"projection": Head(rows, "features", "projection")} | super().build(dim, classes)

    def stages(self) -> tuple[Stage, ...]:
        views, share = self.config.views, self.config.contrast_share
        joint = self.config.mode == "joint"
        contrast = Stage(
            "joint" if joint else "contrast",
            1.0 if joint else share,
            ("projection", "classifier") if joint else ("projection",),
            views=views,
            coupled=True,
            positives=views == 1,
            pairs="class",
        )
        linear = Stage("linear", 1 - share, ("classifier",), freeze_backbone=True)
        return (contrast,) if joint else (contrast, linear)

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        if progress.stage == "linear":
            return combine(ce=(1.0, self._classification(batch, student)))
        rows = required(student.projection)
        losses = self.losses(student, repeat_views(batch.labels, rows))
        if progress.stage == "contrast":
            loss = combine(**{self.term: (1.0, losses)})
        else:
            ce = (1.0, self._classification(batch, student))
            loss = combine(ce=ce, **{self.term: (self.config.weight, losses)})
        return loss._replace(counts=lonely(losses))

    def _classification(self, batch: Batch, student: Outputs) -> PerAnchor:
        logits = required(student.logits)
        return self.classify(logits, repeat_views(batch.labels, logits))


class SupCon(Contrastive, name="supcon"):
    """Pull the images of one class together, push all others away (arXiv 2004.11362).

    Joint with CE, or in two stages as published.
    """

    term = "supcon"

    class Config(Contrastive.Config):
        """Temperature as published."""

        variant: Literal["out", "in"] = option("out", "L_out or L_in of the paper")

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        function = supcon_out if self.config.variant == "out" else supcon_in
        return function(features, labels, temperature=self.config.temperature, validate=False)


class Sincere(Contrastive, name="sincere"):
    """SupCon in which images of a class do not repel each other (arXiv 2309.14277).

    Joint with CE, or in two stages as published.
    """

    term = "sincere"

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        return sincere(features, labels, temperature=self.config.temperature, validate=False)


class VarCon(Contrastive, name="varcon"):
    """Samples against the class centres of a batch; soft targets if confident (arXiv 2506.07413).

    Joint with CE, or in two stages as published. A mixed image is computed for both of its classes.
    """

    two_classes = True

    term = "varcon"

    class Config(Contrastive.Config):
        """Temperature and epsilon as published."""

        epsilon: float = option(0.02, "how far the target's temperature follows confidence", ge=0)

    config: Config

    def contrast(self, features: Tensor, labels: Tensor) -> PerAnchor:
        def centred(classes: Tensor) -> PerAnchor:
            return varcon(
                features,
                classes,
                temperature=self.config.temperature,
                epsilon=self.config.epsilon,
                validate=False,
            )

        return per_class(centred, labels)
