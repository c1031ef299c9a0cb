"""CoNe's two terms over a bank in half precision, without a copy of it: a few anchors and a piece of it at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
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
    differentiated_once,
    full_precision,
    shared_with_bank,
)
from nearkin.functional.neighbours import LEAST_MASS

ANCHORS = 64  # at a time: their scores take 8 bytes an entry of the bank
KEYS = 2048  # keys of 8 bytes a number at a time, more of shorter ones: they stay in the cache
# Probabilities widened at a time: entries, in rows long enough to stream, and classes. What needs no widening goes to
# the product as it is, at once.
SHARES = 8192, 256
# Scores of unit vectors are at most 1 / temperature: up to here their exponentials need no shift.
STEEP = 60
MANY = 1024  # entries from which products in bf16 save anything
GROUP = 4  # rows of a group: more make fewer maxima, and more members to gather
NEAR = 2**19  # numbers of chosen neighbours gathered at a time


class Memory(NamedTuple):
    """What a bank of K entries holds. keys `[K, d]` and probabilities `[C, K]`: of any floating type.

    labels, weights, ids: `[K, 2]`; label -1 is an empty slot, id -1 no second image.
    """

    keys: Float[Tensor, "k d"]
    labels: Int[Tensor, "k 2"]
    weights: Float[Tensor, "k 2"]
    ids: Int[Tensor, "k 2"]
    probabilities: Float[Tensor, "c k"]


class Attention(NamedTuple):
    """neighbours: the losses of `neighbour_nll`. target: `[N, C]` as of `neighbour_target`."""

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
) -> Attention:
    """`neighbour_nll` of query and `neighbour_target` of key; empty slots and an anchor's own copies are masked.

    query, key: `[N, d]` unit rows; gradient flows into query only, and once. labels: `[N]` integers or `[N, C]` rows.
    ids: of each anchor's image, or of its two images, below 2^31; -1 is none. temperatures > 0. topk >= 1.
    Raises ValueError when an argument is wrong. Source: as these two functions; the order of the work is our choice.
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
    return Attention(PerAnchor(value, valid), target)


class _Attention(torch.autograd.Function):
    """Value and validity of the neighbour term, and the target, of some anchors.

    The gradient of the values for the query is known in the forward pass and small, so nothing of the bank is kept.
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
        scores, weights = _attended(query, key, key_temperature, ids, memory)
        target = _target(weights, memory)
        nearest, index = largest(scores, topk)
        valid = ~nearest.amax(1).isneginf()
        usable = valid[:, None]
        # With fewer entries than topk, rows that only fill a group are among them: -inf, of no weight.
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
    @differentiated_once
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, *[None] * 7


class _Weights(NamedTuple):
    """each: exp of the scores `[K, n]`, with a factor of the anchor's own. total: their sums `[n]`."""

    each: Tensor
    total: Tensor


def _attended(
    query: Tensor, key: Tensor, key_temperature: float, ids: Tensor, memory: Memory
) -> tuple[Tensor, _Weights]:
    """keys . query, -inf where barred and in rows up to a multiple of GROUP; the weights by keys . key, 0 where barred.

    An entry's numbers side by side, because few anchors make the best right factor; both products at once.
    """
    count, few, dtype = len(memory.keys), len(ids), _multiplied(query, memory.keys)
    rows = torch.cat([query, key / key_temperature]).to(dtype).T.contiguous()
    scores, weights = rows.new_empty(-(-count // GROUP) * GROUP, few), rows.new_empty(count, few)
    scores[count:] = -torch.inf
    total = query.new_zeros(few)
    gentle = 1 / key_temperature <= STEEP
    for piece, keys, bars in _pieces(ids, memory, dtype):
        near, far = bars.addmm_(keys, rows).chunk(2, dim=1)
        scores[piece] = near
        if gentle:  # at once, while they are in the cache
            total += torch.exp(far, out=weights[piece]).sum(0, dtype=total.dtype)
        else:
            weights[piece] = far
    if not gentle:
        weights -= weights.amax(0).nan_to_num(neginf=0)
        total = weights.exp_().sum(0, dtype=total.dtype)
    return scores, _Weights(weights, total)


def _pieces(
    ids: Tensor, memory: Memory, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the bank: which entries, their keys, and the additive mask `[entries, 2 n]`, once for each product."""
    index, table = own_copy_mask(ids, memory.labels, memory.ids, dtype)
    table = table.repeat(1, 2)
    widened = _Widened(dtype)
    for piece in _steps(memory.keys, len(memory.keys), KEYS * 8 // dtype.itemsize):
        yield piece, widened.of(memory.keys[piece]), embedding_bag(index[piece], table, mode="sum")


def own_copy_mask(
    ids: Int[Tensor, " n"] | Int[Tensor, "n 2"],
    stored_labels: Int[Tensor, "k 2"],
    stored_ids: Int[Tensor, "k 2"],
    dtype: torch.dtype,
) -> tuple[Int[Tensor, "k 2"], Float[Tensor, "m n"]]:
    """The additive mask of a bank as indices `[K, 2]` into a table `[m, n]`: the sum of an entry's two rows.

    -inf for an empty slot and for an entry with one of the anchor's sample ids, else 0. `torch.bucketize` on the
    sorted ids i and i + 1 of all anchors finds the row of each stored id: between i and i + 1 lies only i itself. The
    last row is that of empty slots. One search instead of K n comparisons (1.3 ms instead of 2.8 at 65 536 entries).
    """
    # A missing second id, -1, must not equal that of an entry: -2.
    own = torch.where(ids < 0, -2, ids).view(len(ids), -1)
    starts = torch.cat([own, own + 1]).flatten().sort().values
    table = starts.new_zeros(len(starts) + 2, len(ids), dtype=dtype)
    table[1:-1].masked_fill_((starts[:, None, None] == own).any(2), -torch.inf)
    table[-1] = -torch.inf
    index = torch.bucketize(stored_ids.contiguous(), starts, right=True, out_int32=True)
    return index.masked_fill_(stored_labels[:, :1] < 0, len(table) - 1), table


def _target(weights: _Weights, memory: Memory) -> Tensor:
    """The probabilities' mean by these weights; zeros where all are zero."""
    (each, total), stored = weights, memory.probabilities
    if stored.dtype == each.dtype:
        target = (stored @ each).to(total.dtype)
    else:
        target = total.new_zeros(len(stored), len(total))
        shares, (entries, classes) = _Widened(each.dtype), SHARES
        steps = product(_steps(stored, len(each), entries), _steps(stored, len(stored), classes))
        for piece, some in steps:
            target[some].addmm_(shares.of(stored[some, piece]), each[piece])
    return target.div_(total.where(total > 0, 1)).T.contiguous()


def _multiplied(row: Tensor, stored: Tensor) -> torch.dtype:
    """The type of the products: that of the store, if the processor multiplies in it; else that of the rows.

    Products of bf16 are rounded to it, which a small bank need not pay: its own take no time.
    """
    half = stored.dtype == torch.bfloat16 and row.dtype == torch.float32 and len(stored) >= MANY
    return torch.bfloat16 if half and multiplies_bf16(row.device) else row.dtype


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: a CPU with avx512_bf16 or AMX, a GPU of compute capability 8.0 or more."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _rescored(query: Tensor, rough: Tensor, index: Tensor, keys: Tensor) -> Tensor:
    """query . keys of the chosen entries in the type of the query, -inf where `rough` is; a few anchors at a time."""
    step = max(1, NEAR // (index.shape[1] * keys.shape[1]))
    exact = torch.empty_like(rough, dtype=query.dtype)
    wide = _Widened(query.dtype)
    for rows in _steps(index, len(index), step):
        chosen = keys.index_select(0, index[rows].flatten()).view(-1, index.shape[1], keys.shape[1])
        torch.bmm(query[rows, None], wide.of(chosen).mT, out=exact[rows, None])
    return exact.where(~rough.isneginf(), -torch.inf)


def _mass(scores: Tensor, index: Tensor, labels: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """-log of the attention on the anchors' own classes, 0 where there is none, and its derivative for the scores."""
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
    """sum_j weights_ij keys[index_ij] `[n, d]`, read and added at once; in the type of the store, but float64 stays."""
    dtype = keys.dtype if weights.dtype == torch.float32 else weights.dtype
    mixed = embedding_bag(index, keys.to(dtype), per_sample_weights=weights.to(dtype), mode="sum")
    return mixed.to(weights.dtype)


def _steps(stored: Tensor, count: int, size: int) -> list[slice]:
    """0 ... count in pieces that suit a processor's cache; in one for a GPU, to which few calls matter more."""
    size = size if stored.device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Widened:
    """Parts of a store in another type, one after another in the same memory; as they are if it is theirs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffer: Tensor | None = None

    def of(self, part: Tensor) -> Tensor:
        if part.dtype == self.dtype:
            return part
        if self._buffer is None or self._buffer.numel() < part.numel():
            self._buffer = part.new_empty(part.numel(), dtype=self.dtype)
        return self._buffer[: part.numel()].view(part.shape).copy_(part)


def largest(
    scores: Float[Tensor, "k n"], count: int
) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """The `count` largest of each column and where they are, in any order; of fewer rows all.

    scores: `[K, N]`; groups need a K that is a multiple of `GROUP`. Group g is the rows g, g + K / GROUP,
    g + 2 K / GROUP and so on, so that maxima take whole vectors. The members of the `count` groups with
    the largest maxima, found in the same way, are enough: a group outside has no member above the smallest
    of these maxima, which are `count` scores already. Among equal scores any may be chosen, as torch.topk does.
    Source: our choice.
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
