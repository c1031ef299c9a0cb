"""Gradient accumulation: a batch is split into parts that give the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nearkin.types import Batch, Loss, Outputs


class MicroBatch(NamedTuple):
    """One part of a batch with its outputs on this rank."""

    batch: Batch
    student: Outputs
    teacher: Outputs | None


def split(batch: Batch, count: int) -> list[Batch]:
    """`count` parts of as many images each, in order."""
    if count == 1:
        return [batch]
    images = batch.images.chunk(count, dim=1)
    return [
        Batch(*rows)
        for rows in zip(images, batch.labels.chunk(count), batch.index.chunk(count), strict=True)
    ]


def join(parts: list[MicroBatch]) -> MicroBatch:
    """The parts of one rank's block as one part, detached."""
    batch = Batch(
        parts[0].batch.images,
        torch.cat([part.batch.labels for part in parts]),
        torch.cat([part.batch.index for part in parts]),
    )
    size = parts[0].batch.labels.shape[0]
    student = _join_outputs([part.student for part in parts], size)
    teachers = [part.teacher for part in parts if part.teacher is not None]
    return MicroBatch(batch, student, _join_outputs(teachers, size) if teachers else None)


def _join_outputs(outputs: list[Outputs], size: int) -> Outputs:
    """Outputs of parts with `size` images each, view after view, as the outputs of all their images."""

    def join_field(rows: tuple[Tensor | None, ...]) -> Tensor | None:
        views = [r.detach().view(-1, size, *r.shape[1:]) for r in rows if r is not None]
        return torch.cat(views, dim=1).flatten(0, 1) if views else None

    return Outputs(*(join_field(rows) for rows in zip(*outputs, strict=True)))  # type: ignore[arg-type]


def mean_loss(losses: list[Loss]) -> Loss:
    """The loss of a step for the journal: the mean over its parts, counts summed."""
    if len(losses) == 1:
        return losses[0]
    total = torch.stack([loss.total.detach() for loss in losses]).mean()
    terms = {n: torch.stack([loss.terms[n] for loss in losses]).mean() for n in losses[0].terms}
    counts = {n: torch.stack([loss.counts[n] for loss in losses]).sum() for n in losses[0].counts}
    return Loss(total, terms, counts)


# Gradient caching (Gao et al. 2021, arXiv 2101.06983): the gradient of the loss for the outputs is computed once for
# the whole batch, then back-propagated part by part.


def leaves(outputs: Outputs) -> Outputs:
    """The same values as leaves of a new graph, which collect the gradient of the loss."""
    return Outputs(*(None if o is None else o.detach().requires_grad_() for o in outputs))  # type: ignore[arg-type]


def linearised(outputs: Outputs, fixed: Outputs, images: int, number: int) -> Tensor:
    """A scalar whose gradient, for the weights behind `outputs`, is that of the loss at `fixed`: sum of <dL/do, o>.

    outputs: of part `number` of a block of `images` images. fixed: of the whole block, with gradients.
    """
    total = outputs.features.new_zeros(
        (), dtype=torch.promote_types(outputs.features.dtype, torch.float32)
    )
    for rows, leaf in zip(outputs, fixed, strict=True):
        if rows is None or leaf is None or leaf.grad is None:
            continue
        views = leaf.shape[0] // images
        size = rows.shape[0] // views
        gradient = leaf.grad.view(views, images, *leaf.shape[1:])[
            :, number * size : (number + 1) * size
        ]
        total = total + (rows * gradient.flatten(0, 1)).sum()
    return total


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Restores all buffers afterwards: a forward pass for its outputs alone must not change running statistics."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
