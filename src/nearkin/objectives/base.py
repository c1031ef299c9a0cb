"""The contract that every objective keeps; adding an objective is adding one file beside this one."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from nearkin.functional import PerAnchor, cross_entropy
from nearkin.network import Head
from nearkin.teacher import TeacherPolicy
from nearkin.types import Batch, Facts, Loss, Outputs, Progress

Start = Literal["fresh", "continue", "best"]


class Stage(NamedTuple):
    """What a stretch of training needs.

    name: shown in the journal and in checkpoints. share: of the epochs; the shares of all stages sum to 1.
    heads: the active ones; the others are frozen and not run.
    start: `fresh` weights as initialised, `continue` with the last ones, or the `best` so far.
    views: crops loaded per image, the teacher's own crop included.
    teacher: how the averaged copy is kept, or None for no teacher.
    coupled: whether an anchor's value depends on the other samples of the batch.
    freeze_backbone: the backbone gets no gradient and runs in eval mode.
    """

    name: str
    share: float
    heads: tuple[str, ...]
    start: Start = "continue"
    views: int = 1
    teacher: TeacherPolicy | None = None
    coupled: bool = False
    freeze_backbone: bool = False

    @property
    def student_views(self) -> int:
        """How many of the views the student reads: all, but for a crop that is the teacher's own."""
        return self.views - int(self.teacher is not None and self.teacher.crop == "own")


class Objective(nn.Module):
    """One training objective. Stateless apart from its bank; learnable weights live in the network's heads.

    A subclass registers itself: `class CoNe(Objective, name="cone")`. Its nested frozen `Config` names the
    options with defaults, ranges and descriptions; the command line, the YAML and the docs come from it.
    """

    registry: ClassVar[dict[str, type[Objective]]] = {}
    name: ClassVar[str]

    class Config(BaseModel):
        """Options that every objective has."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        smoothing: float = Field(
            0.0, ge=0.0, lt=1.0, description="label smoothing of the cross-entropy"
        )

        def resolve(self, facts: Facts) -> Self:  # noqa: ARG002 - most objectives have nothing to resolve
            """The same options with every `auto` replaced by the value that `facts` give."""
            return self

    class_weights: Tensor | None

    def __init_subclass__(cls, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        Objective.registry[name] = cls

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("class_weights", None, persistent=False)

    def weigh_classes(self, weights: Tensor | None) -> None:
        """Weigh every cross-entropy term by class. weights: `[C]`, or None for equal weights."""
        self.class_weights = weights

    def classify(self, logits: Tensor, labels: Tensor) -> PerAnchor:
        """The cross-entropy term of every objective: smoothing and class weights applied in one place."""
        return cross_entropy(
            logits, labels, smoothing=self.config.smoothing, class_weights=self.class_weights
        )

    def heads(self, dim: int, classes: int) -> dict[str, Head]:
        """The heads that this objective trains on features of width `dim`; also sizes the bank, if it has one.

        Called once, before training. The network owns the modules.
        """
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        """The stretches of training, in order."""
        raise NotImplementedError

    def forward(
        self, batch: Batch, student: Outputs, teacher: Outputs | None, progress: Progress
    ) -> Loss:
        """The loss of a gathered global batch. Pure: changes no state.

        batch.labels and batch.index have B rows, the outputs `student_views * B` (view after view).
        """
        raise NotImplementedError

    def update(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> None:
        """Side effects (writing a bank), once per optimiser step, after it. Most objectives have none."""


def unit(rows: Tensor) -> Tensor:
    """Rows of unit length, at least in float32; a zero row stays zero."""
    return nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def repeat_views(rows: Tensor, outputs: Tensor) -> Tensor:
    """`rows` `[B, ...]` repeated view after view until they match `outputs` `[V * B, ...]`."""
    views = outputs.shape[0] // rows.shape[0]
    return torch.cat([rows] * views) if views > 1 else rows


def required(output: Tensor | None) -> Tensor:
    """An output that the stage's heads must have written."""
    if output is None:
        raise ValueError("The network gave no such output; is the head that writes it active?")
    return output
