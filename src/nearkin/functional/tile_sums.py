"""Sums over pairs, tile by tile, with a backward pass that computes the tiles again: memory linear in the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nearkin.functional.class_sums import Classes, linear_sum
from nearkin.functional.labels import Labels, hard_if_known
from nearkin.functional.once import differentiated_once
from nearkin.functional.terms import Count, LogSum, Over, Term, Total
from nearkin.functional.tiles import Tile, Tiles

EXACT = 40.0  # beyond it softplus(x) = x to the last bit of float64


def sums_in_tiles(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    """`pair_sums` in tiles, and from class sums what is linear. No exponential is shifted: the caller knows that none
    overflows or vanishes."""
    labels = hard_if_known(labels)
    # Of soft labels a sample's share in itself, often far more than what it shares with all others, would have to be
    # taken off; and any device but the CPU would have to be waited for.
    if labels.ndim == 2 or labels.device.type != "cpu":
        return _in_tiles(features, labels, temperature, terms)
    classes = Classes.of(labels)
    logs = tuple(term for term in terms if isinstance(term, LogSum))
    sums = iter(_in_tiles(features, labels, temperature, logs) if logs else ())
    return tuple(
        next(sums) if isinstance(term, LogSum) else linear_sum(features, classes, temperature, term)
        for term in terms
    )


def _in_tiles(
    features: Tensor, labels: Labels, temperature: float, terms: tuple[Term, ...]
) -> tuple[Tensor, ...]:
    scales = {term.scale for term in terms if isinstance(term, LogSum)}
    # One exponential, its square at most, may take the similarity's place, unless that is asked for itself.
    alone = scales <= {1.0, 2.0} and not any(isinstance(term, Total) for term in terms)
    tiles = Tiles(features.detach(), labels, temperature, exponential=alone)
    sums: Tensor = _Sums.apply(features, tiles, terms)
    return sums.unbind()


def softplus_in_tiles(
    features: Tensor, labels: Labels, temperature: float, level: Tensor
) -> Tensor:
    """`softplus_sum` in tiles; those without a positive pair are passed over."""
    tiles = Tiles(features.detach(), hard_if_known(labels), temperature, exponential=False)
    sums: Tensor = _Softplus.apply(features, level, tiles)
    return sums


class _Sums(torch.autograd.Function):
    """The M terms of each sample, `[M, N]`."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # noqa: ARG004
        tiles: Tiles,
        terms: tuple[Term, ...],
    ) -> Tensor:
        sums = tiles.z.new_zeros(len(terms), len(tiles.z))
        for tile in tiles.all():
            for term, total in zip(terms, sums, strict=True):
                tile.gather(total, _values(tile, term), term.over)
        ctx.tiles, ctx.terms = tiles, terms
        ctx.save_for_backward(sums)
        results = [
            total.where(total > 0, 1).log() if isinstance(term, LogSum) else total
            for term, total in zip(terms, sums, strict=True)
        ]
        return torch.stack([tiles.in_batch_order(result) for result in results])

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        tiles: Tiles = ctx.tiles
        (sums,) = ctx.saved_tensors
        # What all derivatives of a sample's term have in common; 0 for a sample without any weight.
        sloped = [
            (term, tiles.in_tile_order(given) * _steepness(term, total))
            for term, given, total in zip(ctx.terms, upstream, sums, strict=True)
            if not isinstance(term, Count)
        ]
        # Those of all rows first, for the others add to them.
        sloped.sort(key=lambda each: each[0].over == "positives")
        gradient = torch.zeros_like(tiles.z)
        for tile in tiles.all():
            tile.spread(gradient, _slopes(tile, sloped), tiles.z)
        return tiles.in_batch_order(gradient).mul_(tiles.scale), None, None


def _values(tile: Tile, term: Term) -> Tensor:
    """1, s_ij or e^(scale s_ij), of the rows that have a weight; 0 for a sample with itself."""
    if isinstance(term, LogSum):
        return tile.power(term.scale, term.over)
    if isinstance(term, Count):
        return _ones(tile, term.over)
    return tile.values[: tile.height(term.over)]


def _ones(tile: Tile, over: Over) -> Tensor:
    return tile.without_own_(tile.buffer("ones", tile.height(over)).fill_(1))


def _steepness(term: LogSum | Total, total: Tensor) -> Tensor:
    """What all derivatives of a sample's term have in common; 0 for a sample without any weight."""
    if isinstance(term, LogSum):
        return (term.scale / total).where(total > 0, 0)
    return torch.ones_like(total)


def _slopes(tile: Tile, sloped: list[tuple[LogSum | Total, Tensor]]) -> Tensor:
    """The derivatives of the anchors' terms for s_ij: those of i and of j, which weigh alike, added."""
    total: Tensor | None = None
    for term, factor in sloped:
        height = tile.height(term.over)
        buffer = tile.buffer("slopes" if total is None else "more slopes", height)
        rows = factor[tile.rows][:height, None]
        slopes = tile.weigh_(torch.add(rows, factor[tile.cols], out=buffer), term.over)
        derivative = (
            tile.power(term.scale, term.over)
            if isinstance(term, LogSum)
            else _ones(tile, term.over)
        )
        if total is None:
            total = slopes.mul_(derivative)
        else:
            total[:height].addcmul_(slopes, derivative)
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
