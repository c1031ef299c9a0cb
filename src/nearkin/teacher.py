"""The teacher: an exponential moving average of the student, the same on every rank."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nearkin.network import Network
    from nearkin.types import Outputs

# Mixed into the teacher's dropout keys, so that its masks differ from the student's.
TEACHER_SALT = 0x7EAC


class TeacherPolicy(NamedTuple):
    """How the teacher of a stage is updated and what it reads.

    schedule: `constant` momentum from `horizon`, the same `ramped` up from 0, or CoNe's `cosine` from `momentum` to 1.
    horizon: memory of `constant` and `ramped` in epochs (at least 8 steps), above 0. share: the same as a share of the
        stage, in place of `horizon`.
    momentum: start of the cosine schedule, in [0, 1).
    batchnorm: `own` runs the teacher in train mode, with batch statistics and running statistics of its own
        (CoNe's published code); `average` averages the student's statistics and runs in eval mode.
    crop: the teacher reads the `same` views as the student, or its `own` view.
    """

    schedule: Literal["constant", "ramped", "cosine"] = "constant"
    horizon: float = 0.3
    share: float | None = None
    momentum: float = 0.996
    batchnorm: Literal["own", "average"] = "own"
    crop: Literal["same", "own"] = "same"


def momentum_at(policy: TeacherPolicy, step: int, steps: int, steps_per_epoch: int) -> float:
    """The momentum m of `teacher = m * teacher + (1 - m) * student` before forward pass number `step`.

    constant: m = 1 - 1 / max(8, horizon * steps_per_epoch), or share * steps: a memory in epochs or as a share of the
        stage, not in steps.
    ramped: min(1 - 1 / (step + 1), the constant) (Tarvainen and Valpola 2017, published code).
    cosine: m = 1 - (1 - m0)(cos(pi step / steps) + 1) / 2 (CoNe, published code).
    """
    if policy.schedule == "cosine":
        return 1.0 - (1.0 - policy.momentum) * (math.cos(math.pi * step / steps) + 1.0) / 2.0
    memory = policy.horizon * steps_per_epoch if policy.share is None else policy.share * steps
    constant = 1.0 - 1.0 / max(8.0, memory)
    return min(1.0 - 1.0 / (step + 1), constant) if policy.schedule == "ramped" else constant


class Teacher(nn.Module):
    """An exponential moving average of a network: m * teacher + (1 - m) * student, tensor by tensor."""

    def __init__(
        self, student: Network, *, batchnorm: Literal["own", "average"] = "average"
    ) -> None:
        super().__init__()
        self.network: Network = copy.deepcopy(student).requires_grad_(False)
        self.batchnorm = batchnorm
        self.train(batchnorm == "own")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """The teacher's outputs for `images` `[N, channels, H, W]`, without gradient."""
        outputs: Outputs = self.network(images)
        return outputs

    @torch.no_grad()
    def update(self, student: Network, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student; with `average`, BatchNorm statistics as well."""
        _lerp(list(self.network.parameters()), list(student.parameters()), 1.0 - momentum)
        if self.batchnorm == "own":
            return
        pairs = list(zip(self.network.buffers(), student.buffers(), strict=True))
        floating = [(own, other) for own, other in pairs if own.is_floating_point()]
        _lerp([own for own, _ in floating], [other for _, other in floating], 1.0 - momentum)
        for own, other in pairs:
            if not own.is_floating_point():
                own.copy_(other)


def _lerp(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """targets += weight * (sources - targets), in one fused call per device and dtype."""
    if targets:
        torch._foreach_lerp_(targets, [source.detach() for source in sources], weight)
