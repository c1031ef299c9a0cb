"""Sums over pairs tile by tile. The backward pass computes the tiles again, so that memory is linear in the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearkin.functional._common import (
    Labels,
    hard_if_known,
    refuse_second_derivative,
    shared_classes,
)
from nearkin.functional._pairs.linear import linear_sum
from nearkin.functional._pairs.plain import EXACT, LogSum, Number, Term, binary_losses
from nearkin.functional._pairs.tiles import Tile, Tiles, tile_shape


def sums(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    """As `pair_sums`. Exponentials are not shifted: the caller chooses a type that holds them."""
    labels = hard_if_known(labels)
    logs = tuple(term for term in terms if isinstance(term, LogSum))
    log_sums = iter(())
    if logs:
        log_sums = iter(_LogSums.apply(features, Tiles(features, labels, temperature), logs))
    return tuple(
        next(log_sums)
        if isinstance(term, LogSum)
        else linear_sum(features, labels, temperature, term)
        for term in terms
    )


def softplus_sum(features: Tensor, labels: Labels, temperature: float, level: Tensor) -> Tensor:
    """As `nearkin.functional._pairs.softplus_sum`, from strips of rows and the columns that may share their classes."""
    tiles = Tiles(features, hard_if_known(labels), temperature)
    z, level = tiles.sorted(features) * tiles.scale, tiles.sorted(level)
    strips = [
        checkpoint(_softplus_strip, z, tiles.labels, level, rows, columns, use_reentrant=False)
        for rows, columns in tiles.strips()
    ]
    return tiles.unsorted(torch.cat(strips))


def _softplus_strip(
    z: Tensor, labels: Tensor, level: Tensor, rows: slice, columns: slice
) -> Tensor:
    positive = shared_classes(labels[rows], labels[columns], z.dtype)
    positive.diagonal(rows.start - columns.start).zero_()  # a sample with itself
    softplus = F.softplus(level[rows, None] - z[rows] @ z[columns].T, threshold=EXACT)
    return (positive * softplus).sum(1)


def sigmoid_sum(features: Tensor, labels: Labels, scale: Number, bias: Number) -> Tensor:
    """As `nearkin.functional._pairs.sigmoid_sum`, from tiles of the whole matrix.

    The triangle would halve the products, but takes a backward pass of its own, for scale and bias too.
    """
    labels, count = hard_if_known(labels), len(features)
    height, width = tile_shape(features.device)
    columns = [slice(at, min(at + height, count)) for at in range(0, count, height)]
    strips = []
    for at in range(0, count, width):
        rows = slice(at, min(at + width, count))
        parts = [
            checkpoint(
                _sigmoid_tile, features, labels, scale, bias, rows, each, use_reentrant=False
            )
            for each in columns
        ]
        strips.append(torch.stack(parts).sum(0))
    return torch.cat(strips)


def _sigmoid_tile(
    z: Tensor, labels: Tensor, scale: Number, bias: Number, rows: slice, columns: slice
) -> Tensor:
    positive = shared_classes(labels[rows], labels[columns], z.dtype)
    losses = binary_losses(scale * (z[rows] @ z[columns].T) + bias, positive)
    own = torch.arange(rows.start, rows.stop, device=z.device)[:, None]
    others = own != torch.arange(columns.start, columns.stop, device=z.device)
    return (losses * others).sum(1)


class _LogSums(torch.autograd.Function):
    """The M terms of each sample, `[M, N]`."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # noqa: ARG004
        tiles: Tiles,
        terms: tuple[LogSum, ...],
    ) -> Tensor:
        sums = tiles.z.new_zeros(len(terms), len(tiles.z))
        for tile in tiles.all():
            exponentials = tile.exponentials({term.scale for term in terms})
            for term, total in zip(terms, sums, strict=True):
                values = exponentials[term.scale][: tile.height(term.over)]
                tile.add_weighed(total, values, term.over)
        ctx.tiles, ctx.terms = tiles, terms
        ctx.save_for_backward(sums)
        return tiles.unsorted(sums.where(sums > 0, 1).log(), dim=1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        tiles: Tiles = ctx.tiles
        (sums,) = ctx.saved_tensors
        # The common factor of a sample's derivatives: upstream scale / sum; 0 where all weights are 0.
        shares = [term.scale / row for term, row in zip(ctx.terms, sums, strict=True)]
        factors = tiles.sorted(upstream, dim=1) * torch.stack(shares).where(sums > 0, 0)
        # Terms over all rows first, because those over the near rows are added to them.
        terms = sorted(zip(ctx.terms, factors, strict=True), key=lambda t: t[0].over == "positives")
        gradient = torch.zeros_like(tiles.z)
        for tile in tiles.all():
            tile.add_gradient(gradient, _slopes(tile, terms), tiles.z)
        return tiles.unsorted(gradient).mul_(tiles.scale), None, None


def _slopes(tile: Tile, terms: list[tuple[LogSum, Tensor]]) -> Tensor:
    """The derivatives of all terms for s_ij, with i and with j as the anchor, added."""
    exponentials = tile.exponentials({term.scale for term, _ in terms})
    slopes: Tensor | None = None
    for term, factor in terms:
        height = tile.height(term.over)
        buffer = tile.buffer("slopes" if slopes is None else "more slopes", height)
        torch.add(factor[tile.rows][:height, None], factor[tile.cols], out=buffer)
        tile.weigh_(buffer, term.over)
        exponential = exponentials[term.scale][:height]
        if slopes is None:
            slopes = buffer.mul_(exponential)
        else:
            slopes[:height].addcmul_(buffer, exponential)
    assert slopes is not None  # `sums` asks for at least one term
    return slopes
