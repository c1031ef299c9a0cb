"""Sums over pairs, tile by tile, with a backward pass that computes the tiles again: memory linear in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearkin.functional.class_sums import linear_sum
from nearkin.functional.labels import Labels, hard_if_known
from nearkin.functional.once import differentiated_once
from nearkin.functional.terms import LogSum, Term
from nearkin.functional.tiles import Tile, Tiles

EXACT = 40.0  # beyond it softplus(x) = x to the last bit of float64


def sums_in_tiles(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    """`pair_sums` in tiles, and by classes what is linear. No exponential is shifted: the caller knows that none
    overflows or vanishes."""
    labels = hard_if_known(labels)
    asked = tuple(term for term in terms if isinstance(term, LogSum))
    log_sums = {}
    if asked:
        tiles = Tiles(features.detach(), labels, temperature, {term.scale for term in asked})
        log_sums = dict(zip(asked, _LogSums.apply(features, tiles, asked).unbind(), strict=True))
    return tuple(
        log_sums[term]
        if isinstance(term, LogSum)
        else linear_sum(features, labels, temperature, term)
        for term in terms
    )


def softplus_in_tiles(
    features: Tensor, labels: Labels, temperature: float, level: Tensor
) -> Tensor:
    """`softplus_sum` in tiles; those without a positive pair are passed over."""
    tiles = Tiles(features.detach(), hard_if_known(labels), temperature)
    sums: Tensor = _Softplus.apply(features, level, tiles)
    return sums


class _LogSums(torch.autograd.Function):
    """The M terms of each sample, `[M, N]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, tiles: Tiles, terms: tuple[LogSum, ...]) -> Tensor:  # noqa: ARG004
        sums = tiles.z.new_zeros(len(terms), len(tiles.z))
        for tile in _needed(tiles, terms):
            for term, total in zip(terms, sums, strict=True):
                tile.gather(total, tile.power(term.scale, term.over), term.over)
        ctx.tiles, ctx.terms = tiles, terms
        ctx.save_for_backward(sums)
        return torch.stack(
            [tiles.in_batch_order(total.where(total > 0, 1).log()) for total in sums]
        )

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        tiles: Tiles = ctx.tiles
        (sums,) = ctx.saved_tensors
        # What all derivatives of a sample's term have in common; 0 for a sample without any weight.
        factors = [
            tiles.in_tile_order(given) * (term.scale / total).where(total > 0, 0)
            for term, given, total in zip(ctx.terms, upstream, sums, strict=True)
        ]
        # Those of all rows first, for the others add to them.
        sloped = sorted(
            zip(ctx.terms, factors, strict=True), key=lambda each: each[0].over == "positives"
        )
        gradient = torch.zeros_like(tiles.z)
        for tile in _needed(tiles, ctx.terms):
            tile.spread(gradient, _slopes(tile, sloped), tiles.z)
        return tiles.in_batch_order(gradient).mul_(tiles.scale), None, None


def _needed(tiles: Tiles, terms: tuple[LogSum, ...]) -> Iterator[Tile]:
    """The tiles with pairs that weigh anything."""
    return tiles.near() if all(term.over == "positives" for term in terms) else tiles.all()


def _slopes(tile: Tile, sloped: list[tuple[LogSum, Tensor]]) -> Tensor:
    """The derivatives of the anchors' terms for s_ij: those of i and of j, which weigh alike, added."""
    total: Tensor | None = None
    for term, factor in sloped:
        height = tile.height(term.over)
        buffer = tile.buffer("slopes" if total is None else "more slopes", height)
        rows = factor[tile.rows][:height, None]
        slopes = tile.weigh_(torch.add(rows, factor[tile.cols], out=buffer), term.over)
        power = tile.power(term.scale, term.over)
        if total is None:
            total = slopes.mul_(power)
        else:
            total[:height].addcmul_(slopes, power)
    assert total is not None  # the caller has at least one
    return total


class _Softplus(torch.autograd.Function):
    """sum_p a_ip softplus(level_i - s_ip), `[N]`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, level: Tensor, tiles: Tiles) -> Tensor:  # noqa: ARG004
        level = tiles.in_tile_order(level)
        sums = torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (F.softplus(rise, threshold=EXACT) for rise in _rises(tile, level))
            tile.add_rows(sums, _positive(tile, by_row))
            tile.add_cols(sums, _positive(tile, by_col))
        ctx.tiles = tiles
        ctx.save_for_backward(level)
        return tiles.in_batch_order(sums)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        tiles: Tiles = ctx.tiles
        (level,) = ctx.saved_tensors
        upstream = tiles.in_tile_order(upstream)
        gradient, steepness = torch.zeros_like(tiles.z), torch.zeros_like(level)
        for tile in tiles.near():
            by_row, by_col = (_positive(tile, rise.sigmoid_()) for rise in _rises(tile, level))
            tile.add_rows(steepness, by_row)
            tile.add_cols(steepness, by_col)
            slopes = by_row.mul_(-upstream[tile.rows, None])
            slopes.addcmul_(by_col, upstream[tile.cols], value=-1)
            tile.spread(gradient, slopes, tiles.z)
        to_level = tiles.in_batch_order(upstream * steepness)
        return tiles.in_batch_order(gradient).mul_(tiles.scale), to_level, None


def _positive(tile: Tile, values: Tensor) -> Tensor:
    return tile.without_own_(tile.weigh_(values, "positives"))


def _rises(tile: Tile, level: Tensor) -> tuple[Tensor, Tensor]:
    """level_i - s_ij with the rows as anchors, and with the columns."""
    height = len(tile.values)
    by_row = torch.sub(level[tile.rows, None], tile.values, out=tile.buffer("by row", height))
    return by_row, torch.sub(level[tile.cols], tile.values, out=tile.buffer("by column", height))
