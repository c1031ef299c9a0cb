"""Sums over pairs tile by tile. The backward pass computes the tiles again, so that memory is linear in the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearkin.functional._common import Labels, differentiated_once, hard_if_known
from nearkin.functional._pairs.linear import linear_sum
from nearkin.functional._pairs.plain import EXACT
from nearkin.functional._pairs.terms import LogSum, Term
from nearkin.functional._pairs.tiles import Tile, Tiles


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
    """As `nearkin.functional._pairs.softplus_sum`; tiles without a positive pair are skipped."""
    tiles = Tiles(features, hard_if_known(labels), temperature)
    summed: Tensor = _Softplus.apply(features, level, tiles)
    return summed


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
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        tiles: Tiles = ctx.tiles
        (sums,) = ctx.saved_tensors
        # The common factor of a sample's derivatives: upstream scale / sum; 0 where all weights are 0.
        scales = sums.new_tensor([[term.scale] for term in ctx.terms])
        factors = tiles.sorted(upstream, dim=1) * (scales / sums).where(sums > 0, 0)
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


class _Softplus(torch.autograd.Function):
    """sum_p a_ip softplus(level_i - s_ip), `[N]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, level: Tensor, tiles: Tiles) -> Tensor:  # noqa: ARG004
        level = tiles.sorted(level)
        sums = torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (F.softplus(x, threshold=EXACT) for x in _differences(tile, level))
            tile.add_rows(sums, _positive(tile, by_row))
            sums[tile.cols].add_(_positive(tile, by_col).sum(0))
        ctx.tiles = tiles
        ctx.save_for_backward(level)
        return tiles.unsorted(sums)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        tiles: Tiles = ctx.tiles
        (level,) = ctx.saved_tensors
        upstream = tiles.sorted(upstream)
        gradient, steepness = torch.zeros_like(tiles.z), torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (_positive(tile, x.sigmoid_()) for x in _differences(tile, level))
            tile.add_rows(steepness, by_row)
            steepness[tile.cols].add_(by_col.sum(0))
            slopes = by_row.mul_(-upstream[tile.rows, None])
            slopes.addcmul_(by_col, upstream[tile.cols], value=-1)
            tile.add_gradient(gradient, slopes, tiles.z)
        to_level = tiles.unsorted(upstream * steepness)
        return tiles.unsorted(gradient).mul_(tiles.scale), to_level, None


def _differences(tile: Tile, level: Tensor) -> tuple[Tensor, Tensor]:
    """level_i - s_ij with the rows as anchors, and with the columns."""
    height = len(tile.similarity)
    by_row = torch.sub(level[tile.rows, None], tile.similarity, out=tile.buffer("by row", height))
    by_col = torch.sub(level[tile.cols], tile.similarity, out=tile.buffer("by column", height))
    return by_row, by_col


def _positive(tile: Tile, values: Tensor) -> Tensor:
    return tile.clear_own_(tile.weigh_(values, "positives"))
