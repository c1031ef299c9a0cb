"""Sums over pairs, tile by tile, with a backward pass that computes the tiles again: memory linear in the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearkin.functional.labels import Labels
from nearkin.functional.once import differentiated_once
from nearkin.functional.terms import Count, LogSum, Term
from nearkin.functional.tiles import Tile, Tiles

EXACT = 40.0  # beyond it softplus(x) = x to the last bit of float64


def sums_in_tiles(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    """`pair_sums` in tiles. No exponential is shifted: the caller knows that none overflows or vanishes."""
    tiles = Tiles(features.detach(), labels, temperature)
    sums: Tensor = _Sums.apply(features, tiles, terms)
    return sums.unbind()


def softplus_in_tiles(
    features: Tensor, labels: Labels, temperature: float, level: Tensor
) -> Tensor:
    """`softplus_sum` in tiles; those without a positive pair are passed over."""
    tiles = Tiles(features.detach(), labels, temperature)
    sums: Tensor = _Softplus.apply(features, level, tiles)
    return sums


class _Sums(torch.autograd.Function):
    """The M terms of each sample, `[M, N]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, tiles: Tiles, terms: tuple[Term, ...]) -> Tensor:  # noqa: ARG004
        sums = tiles.z.new_zeros(len(terms), len(tiles.z))
        for tile in tiles.all():
            for term, total in zip(terms, sums, strict=True):
                over = "positives" if isinstance(term, Count) else term.over
                if not tile.lacks(over):
                    values = tile.weighed(_values(tile, term), over)
                    tile.gather_rows(total, values)
                    tile.gather_cols(total, values)
        ctx.tiles, ctx.terms = tiles, terms
        ctx.save_for_backward(sums)
        results = [_result(term, total) for term, total in zip(terms, sums, strict=True)]
        return torch.stack([tiles.in_batch_order(result) for result in results])

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        tiles: Tiles = ctx.tiles
        sloped = [
            (term, given[tiles.order] * _steepness(term, total))
            for term, given, total in zip(ctx.terms, upstream, *ctx.saved_tensors, strict=True)
            if not isinstance(term, Count)
        ]
        gradient = torch.zeros_like(tiles.z)
        for tile in tiles.all():
            present = [(t, factor) for t, factor in sloped if not tile.lacks(t.over)]
            if present:
                tile.spread(gradient, _slopes(tile, present), tiles.z)
        return tiles.in_batch_order(gradient).mul_(tiles.scale), None, None


def _values(tile: Tile, term: Term) -> Tensor:
    """1, s_ij or e^(scale s_ij)."""
    if isinstance(term, LogSum):
        return tile.power(term.scale)
    return tile.buffer("ones").fill_(1) if isinstance(term, Count) else tile.similarity


def _result(term: Term, total: Tensor) -> Tensor:
    """The term, from the sums of its values; of a count, from those over the positives: few tiles hold any."""
    if isinstance(term, LogSum):
        return total.where(total > 0, 1).log()
    if isinstance(term, Count) and term.over != "positives":
        others = len(total) - 1
        return others - total if term.over == "negatives" else torch.full_like(total, others)
    return total


def _steepness(term: Term, total: Tensor) -> Tensor:
    """What all derivatives of a sample's term have in common; 0 for a sample without any weight."""
    if isinstance(term, LogSum):
        return (term.scale / total).where(total > 0, 0)
    return torch.ones_like(total)


def _slopes(tile: Tile, sloped: list[tuple[Term, Tensor]]) -> Tensor:
    """The derivatives of the anchors' terms for s_ij: those of i and of j, which weigh alike, added."""
    total: Tensor | None = None
    for term, factor in sloped:
        buffer = tile.buffer("slopes" if total is None else "more slopes")
        slopes = torch.add(factor[tile.rows, None], factor[tile.cols], out=buffer)
        tile.weigh_(slopes, term.over)
        if not isinstance(term, LogSum):
            total = slopes if total is None else total.add_(slopes)
        elif total is None:
            total = slopes.mul_(tile.power(term.scale))
        else:
            total.addcmul_(slopes, tile.power(term.scale))
    assert total is not None  # the caller has at least one
    return total


class _Softplus(torch.autograd.Function):
    """sum_p a_ip softplus(level_i - s_ip), `[N]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, level: Tensor, tiles: Tiles) -> Tensor:  # noqa: ARG004
        level = level[tiles.order]
        sums = torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (F.softplus(rise, threshold=EXACT) for rise in _rises(tile, level))
            tile.gather_rows(sums, tile.weigh_(by_row, "positives"))
            tile.gather_cols(sums, tile.weigh_(by_col, "positives"))
        ctx.tiles = tiles
        ctx.save_for_backward(level)
        return tiles.in_batch_order(sums)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        tiles: Tiles = ctx.tiles
        (level,) = ctx.saved_tensors
        upstream = upstream[tiles.order]
        gradient, steepness = torch.zeros_like(tiles.z), torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (
                tile.weigh_(rise.sigmoid_(), "positives") for rise in _rises(tile, level)
            )
            tile.gather_rows(steepness, by_row)
            tile.gather_cols(steepness, by_col)
            slopes = by_row.mul_(-upstream[tile.rows, None])
            slopes.addcmul_(by_col, upstream[tile.cols], value=-1)
            tile.spread(gradient, slopes, tiles.z)
        to_level = tiles.in_batch_order(upstream * steepness)
        return tiles.in_batch_order(gradient).mul_(tiles.scale), to_level, None


def _rises(tile: Tile, level: Tensor) -> tuple[Tensor, Tensor]:
    """level_i - s_ij with the rows as anchors, and with the columns."""
    by_row = torch.sub(level[tile.rows, None], tile.similarity, out=tile.buffer("by row"))
    return by_row, torch.sub(level[tile.cols], tile.similarity, out=tile.buffer("by column"))
