"""Values of some samples at a time, computed again in the backward pass: memory linear in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearkin.functional.once import differentiated_once

HEIGHT = 32  # anchors of a strip

Sums = Callable[[Tensor, slice], tuple[Tensor, ...]]  # of features and anchors: values `[anchors]`


def in_strips(features: Tensor, sums: Sums) -> tuple[Tensor, ...]:
    """`sums(features, all samples)`, `[N]` each, by strips."""
    values: Tensor = _Strips.apply(features, sums)
    return values.unbind()


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, sums: Sums) -> Tensor:
        ctx.sums = sums
        ctx.save_for_backward(features)
        return torch.cat([torch.stack(sums(features, anchors)) for anchors in _strips(features)], 1)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        gradient = torch.zeros_like(features)
        for anchors in _strips(features):
            with torch.enable_grad():
                leaf = features.detach().requires_grad_()
                values = torch.stack(ctx.sums(leaf, anchors))
            gradient += torch.autograd.grad(values, leaf, upstream[:, anchors])[0]
        return gradient, None


def _strips(features: Tensor) -> list[slice]:
    return [slice(i, i + HEIGHT) for i in range(0, len(features), HEIGHT)]
