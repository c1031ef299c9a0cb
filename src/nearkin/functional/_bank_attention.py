"""CoNe's two terms over a bank, 64 anchors and a piece of the bank at a time, so that the bank is never copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from nearkin.functional._checks import check_labels, check_positive, check_rows
from nearkin.functional._common import (
    Labels,
    PerAnchor,
    SoftPairs,
    full_precision,
    refuse_second_derivative,
    shared_with_bank,
)
from nearkin.functional.neighbours import LEAST_MASS

ANCHORS = 64  # at a time; each takes two scores per entry of the bank
KEYS = 2048  # keys at a time, as float64; more of narrower types: a piece stays in the cache
CLASSES = 64  # rows of probabilities at a time: if cast, they take 16 MiB at 65 536 entries
# Scores of unit vectors are at most 1 / temperature: up to this their exponentials need no shift (7 % of the loss).
STEEP = 60
MANY = 1024  # from this number of entries on products in bf16 are faster
GROUP = 4  # rows of a group in `largest`: more give fewer maxima, but more members to gather
NEAR = 2**19  # numbers of chosen keys that are gathered at a time


class Memory(NamedTuple):
    """The content of a bank of K entries. keys `[K, d]` and probabilities `[C, K]`: of any floating type.

    labels, weights, ids: `[K, 2]`; label -1 is an empty slot, id -1 no second image.
    """

    keys: Float[Tensor, "k d"]
    labels: Int[Tensor, "k 2"]
    weights: Float[Tensor, "k 2"]
    ids: Int[Tensor, "k 2"]
    probabilities: Float[Tensor, "c k"]


class BankTerms(NamedTuple):
    """neighbours: the losses of `neighbour_nll`. target: `[N, C]`, the result of `neighbour_target`."""

    neighbours: PerAnchor
    target: Float[Tensor, "n c"]


@full_precision
def bank_attention(
    query: Float[Tensor, "n d"],
    key: Float[Tensor, "n d"],
    labels: Labels,
    ids: Int[Tensor, " n"] | Int[Tensor, "n 2"],
    memory: Memory,
    *,
    query_temperature: float,
    key_temperature: float,
    topk: int,
) -> BankTerms:
    """`neighbour_nll` of query and `neighbour_target` of key; empty slots and an anchor's own copies are masked.

    query, key: `[N, d]` unit rows; only query gets a gradient, which cannot be differentiated again. labels: `[N]`
    integers or `[N, C]` rows. ids: the sample ids of each anchor's image, or of its two images; -1 is none.
    temperatures > 0. topk >= 1. Values are not checked. Raises ValueError when a shape or an option is wrong.
    Source: as these two functions.
    """
    check_positive("query_temperature", query_temperature)
    check_positive("key_temperature", key_temperature)
    check_positive("topk", topk)
    check_labels(labels, len(query), validate=False)
    check_rows("ids", ids, len(query))
    options = memory, query_temperature, key_temperature, topk
    parts = [
        _Attention.apply(query[rows], key[rows], labels[rows], ids[rows], *options)
        for rows in (slice(i, i + ANCHORS) for i in range(0, len(query), ANCHORS))
    ]
    value, valid, target = (torch.cat(column) for column in zip(*parts, strict=True))
    return BankTerms(PerAnchor(value, valid), target)


class _Attention(torch.autograd.Function):
    """Value and validity of the neighbour term, and the target, of at most ANCHORS anchors.

    The forward pass computes the gradient for the query too: `[n, d]`, so nothing of the bank's size is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        labels: Tensor,
        ids: Tensor,
        memory: Memory,
        query_temperature: float,
        key_temperature: float,
        topk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, weights, total = _attended(query, key, key_temperature, ids, memory)
        target = _target(weights, total, memory)
        nearest, index = largest(scores, topk)
        valid = ~nearest.amax(1).isneginf()
        usable = valid[:, None]
        # With fewer entries than topk, padding rows are among the nearest: their score is -inf, their weight 0.
        index = index.clamp(max=len(memory.keys) - 1)
        if nearest.dtype != query.dtype:
            nearest = _rescored(query, nearest, index, memory.keys)
        # A row without a usable entry must not be -inf everywhere: its softmax is NaN.
        value, slope = _mass(nearest.where(usable, 0) / query_temperature, index, labels, memory)
        if ctx.needs_input_grad[0]:
            slope = (slope / query_temperature).where(usable, 0)
            ctx.save_for_backward(_mix(slope, index, memory.keys))
        ctx.mark_non_differentiable(valid, target)
        return value.where(valid, 0), valid, target

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, *[None] * 7


def _attended(
    query: Tensor, key: Tensor, key_temperature: float, ids: Tensor, memory: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores keys . query `[K, n]`, -inf where masked; the weights from keys . key, 0 there, and their sums `[n]`.

    The scores are padded with -inf to a multiple of GROUP rows. keys @ rows.T takes 0.75 of the time of rows @ keys.T.
    """
    count, few, dtype = len(memory.keys), len(ids), _multiplied(query, memory.keys)
    rows = torch.cat([query, key / key_temperature]).to(dtype).T.contiguous()
    scores, weights = rows.new_empty(-(-count // GROUP) * GROUP, few), rows.new_empty(count, few)
    scores[count:] = -torch.inf
    total = query.new_zeros(few)
    gentle = 1 / key_temperature <= STEEP
    for piece, keys, mask in _pieces(ids, memory, dtype):
        near, far = mask.addmm_(keys, rows).chunk(2, dim=1)
        scores[piece] = near
        if gentle:  # while the piece is in the cache
            total += torch.exp(far, out=weights[piece]).sum(0, dtype=total.dtype)
        else:
            weights[piece] = far
    if not gentle:
        weights -= weights.amax(0).nan_to_num(neginf=0)
        total = weights.exp_().sum(0, dtype=total.dtype)
    return scores, weights, total


def _pieces(
    ids: Tensor, memory: Memory, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the bank: which entries, their keys, and the additive mask `[entries, 2 n]`, once for each product."""
    index, table = own_copy_mask(ids, memory.labels, memory.ids, dtype)
    table = table.repeat(1, 2)
    for piece in _steps(memory.keys, len(memory.keys), KEYS * 8 // dtype.itemsize):
        yield piece, memory.keys[piece].to(dtype), embedding_bag(index[piece], table, mode="sum")


def own_copy_mask(
    ids: Int[Tensor, " n"] | Int[Tensor, "n 2"],
    stored_labels: Int[Tensor, "k 2"],
    stored_ids: Int[Tensor, "k 2"],
    dtype: torch.dtype,
) -> tuple[Int[Tensor, "k 2"], Float[Tensor, "m n"]]:
    """The additive mask of a bank as indices `[K, 2]` into a table `[m, n]`: the sum of an entry's two rows.

    -inf for an empty slot (the table's last row) and for an entry with one of the anchor's sample ids, else 0. The rows
    are found by `torch.bucketize` on the sorted ids i and i + 1: 1.3 ms instead of the 2.8 of comparisons (K = 65 536).
    """
    # A missing second id, -1, must not equal that of an entry: -2.
    own = torch.where(ids < 0, -2, ids).view(len(ids), -1)
    starts = torch.cat([own, own + 1]).flatten().sort().values
    table = starts.new_zeros(len(starts) + 2, len(ids), dtype=dtype)
    table[1:-1].masked_fill_((starts[:, None, None] == own).any(2), -torch.inf)
    table[-1] = -torch.inf
    index = torch.bucketize(stored_ids.contiguous(), starts, right=True, out_int32=True)
    return index.masked_fill_(stored_labels[:, :1] < 0, len(table) - 1), table


def _target(each: Tensor, total: Tensor, memory: Memory) -> Tensor:
    """The mean of the probabilities with the weights `each`; zeros where all weights are zero."""
    stored = memory.probabilities
    # Without a cast one product is faster: 66 ms of CPU time for the whole loss instead of 77.
    same = stored.dtype == each.dtype
    rows = [slice(None)] if same else _steps(stored, len(stored), CLASSES)
    target = torch.cat([(stored[piece].to(each.dtype) @ each).to(total.dtype) for piece in rows])
    return target.div_(total.where(total > 0, 1)).T.contiguous()


def _multiplied(row: Tensor, stored: Tensor) -> torch.dtype:
    """The type of the products: bf16 if the bank stores it and the hardware multiplies it, else that of the rows.

    A small bank takes that of the rows as well: rounding to bf16 would save no time there.
    """
    half = stored.dtype == torch.bfloat16 and row.dtype == torch.float32 and len(stored) >= MANY
    return torch.bfloat16 if half and multiplies_bf16(row.device) else row.dtype


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: a CPU with avx512_bf16 or AMX, a GPU of compute capability 8.0 or more."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _rescored(query: Tensor, rough: Tensor, index: Tensor, keys: Tensor) -> Tensor:
    """query . keys of the chosen entries in the type of the query; -inf where `rough` is."""
    step = max(1, NEAR // (index.shape[1] * keys.shape[1]))
    exact = torch.empty_like(rough, dtype=query.dtype)
    for rows in _steps(index, len(index), step):
        chosen = keys.index_select(0, index[rows].flatten()).view(-1, index.shape[1], keys.shape[1])
        torch.bmm(query[rows, None], chosen.to(query.dtype).mT, out=exact[rows, None])
    return exact.where(~rough.isneginf(), -torch.inf)


def _mass(scores: Tensor, index: Tensor, labels: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """-log of the attention on the anchors' own classes, 0 where it is 0, and its derivative for the scores."""
    at = index.flatten()
    stored = memory.labels.index_select(0, at), memory.weights.index_select(0, at).to(scores.dtype)
    pairs = SoftPairs(*(each.view(*index.shape, -1) for each in stored))
    positive = shared_with_bank(labels, pairs).to(scores.dtype)
    attention = scores.softmax(1)
    mass = (attention * positive).sum(1, keepdim=True)
    counts = mass > LEAST_MASS
    safe = mass.where(counts, 1)
    slope = torch.where(counts, attention * (1 - positive / safe), 0)
    return -safe.log().squeeze(1), slope


def _mix(weights: Tensor, index: Tensor, keys: Tensor) -> Tensor:
    """sum_j weights_ij keys[index_ij] `[n, d]`, without gathering the keys; in the type of the bank, or float64."""
    dtype = keys.dtype if weights.dtype == torch.float32 else weights.dtype
    mixed = embedding_bag(index, keys.to(dtype), per_sample_weights=weights.to(dtype), mode="sum")
    return mixed.to(weights.dtype)


def _steps(stored: Tensor, count: int, size: int) -> list[slice]:
    """Slices of 0 ... count: of `size` on a CPU, whose cache holds them; one on a GPU, where few calls are faster."""
    size = size if stored.device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def largest(
    scores: Float[Tensor, "k n"], count: int
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The `count` largest of each column and their rows, in any order; all if there are fewer rows.

    torch.topk on the maxima of groups first: 35 ms of CPU time less of 100 for the whole loss at K = 65 536. Group g
    holds the rows g + i K / GROUP. The `count` groups with the largest maxima hold the result.
    """
    rows = len(scores)
    groups = rows // GROUP
    if rows % GROUP or groups <= 2 * count:
        values, index = scores.T.topk(min(count, rows), dim=1, sorted=False)
        return values, index
    _, best = largest(scores.view(GROUP, groups, -1).amax(0), count)
    start = torch.arange(0, rows, groups, device=scores.device)
    members = (best[:, None] + start[:, None]).flatten(1)
    values, at = scores.T.gather(1, members).topk(count, dim=1, sorted=False)
    return values, members.gather(1, at)
