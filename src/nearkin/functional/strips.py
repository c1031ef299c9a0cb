"""Values of some samples at a time, computed again in the backward pass: memory linear in the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from nearkin.functional.once import differentiated_once

HEIGHT = 128  # anchors of a strip on a processor: fewer cost more calls, more cost memory
TALL = 1024  # on a GPU, which needs large products and few calls

Values = tuple[Tensor, ...]
Sums = Callable[..., Values]  # of the inputs and the anchors `[m]`, integers: values `[m]` each


def in_strips(sums: Sums, *inputs: Tensor) -> Values:
    """`sums(*inputs, all samples)`, `[N]` each, by strips; differentiable in the inputs, `[N, ...]` each."""
    values: Tensor = _Strips.apply(sums, *inputs)
    return values.unbind()


@functools.cache
def fused(sums: Sums) -> Sums:
    """`sums` as a few kernels, if there is a compiler for the GPU: not every operation reads a strip again."""
    return torch.compile(sums) if has_triton() else sums


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Sums, *inputs: Tensor) -> Tensor:
        ctx.sums = sums
        ctx.save_for_backward(*inputs)
        known = [each.detach() for each in inputs]  # a compiler would look for their gradients
        return torch.cat([torch.stack(sums(*known, anchors)) for anchors in _strips(known[0])], 1)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [torch.zeros_like(each) for each in inputs]
        for anchors in _strips(inputs[0]):
            with torch.enable_grad():
                leaves = [each.detach().requires_grad_() for each in inputs]
                values = torch.stack(ctx.sums(*leaves, anchors))
            parts = torch.autograd.grad(values, leaves, upstream[:, anchors])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient += part
        return None, *gradients


def _strips(features: Tensor) -> tuple[Tensor, ...]:
    height = TALL if features.is_cuda else HEIGHT
    return torch.split(torch.arange(len(features), device=features.device), height)
