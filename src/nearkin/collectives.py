"""What the processes of a run tell each other inside the mathematics. Imports torch only; alone, a no-op."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, rank after rank, with gradient.

    x: `[n, ...]`, the same n and dtype on all W ranks -> `[W * n, ...]`. The gradient of x is the sum over
    ranks of the gradients of its rows: with the same loss L on every rank that is W dL/dx, which the mean
    over ranks that DDP takes of parameter gradients turns into dL/dx. Without a process group, x itself.
    """
    if not dist.is_initialized():
        return x
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, without gradient. Without a process group, x itself."""
    if not dist.is_initialized():
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        gathered = x.new_empty((dist.get_world_size() * ctx.rows, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return sum_over_ranks(grad)[first : first + ctx.rows]
