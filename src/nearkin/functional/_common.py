"""What all losses share: the result per anchor, labels and how much of a class two samples share, masks, precision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearkin.functional._checks import check_classes, check_rows, check_shares

Hard: TypeAlias = Int[Tensor, " n"]
Labels: TypeAlias = Int[Tensor, " n"] | Float[Tensor, "n c"]
Mask: TypeAlias = Bool[Tensor, "n k"] | Bool[Tensor, " k"]
P = ParamSpec("P")
R = TypeVar("R")


class PerAnchor(NamedTuple):
    """value: `[N]` the loss of each anchor (0 where invalid). valid: `[N]` whether it counts in the mean."""

    value: Float[Tensor, " n"]
    valid: Bool[Tensor, " n"]


def mean_valid(losses: PerAnchor) -> Float[Tensor, ""]:
    """Sum of the valid values divided by their count; 0, with gradient 0, when nothing is valid.

    The values cover the gathered global batch, so no rank is special.
    """
    total = losses.value.where(losses.valid, losses.value.new_zeros(())).sum()
    return total / losses.valid.sum().clamp(min=1)


def masked(value: Float[Tensor, " n"], valid: Bool[Tensor, " n"]) -> PerAnchor:
    """`value` where valid, 0 with gradient 0 elsewhere."""
    return PerAnchor(value.where(valid, 0), valid)


def all_valid(value: Float[Tensor, " n"]) -> PerAnchor:
    """`value` of losses whose anchors always count."""
    return PerAnchor(value, torch.ones_like(value, dtype=torch.bool))


class SoftPairs(NamedTuple):
    """At most two classes per sample.

    labels: `[K, 2]` integers, -1 for none. weights: `[K, 2]`, rows sum to 1.
    The form in which a bank stores mixed images: `[K, C]` rows would take too much memory.
    """

    labels: Int[Tensor, "*k 2"]
    weights: Float[Tensor, "*k 2"]


BankLabels: TypeAlias = Int[Tensor, " k"] | SoftPairs


def bank_pairs(
    labels: BankLabels, entries: int, classes: int | None, *, validate: bool
) -> SoftPairs:
    """The labels of a bank as pairs. Raises ValueError when their count, or on request their values, are wrong."""
    pairs = labels if isinstance(labels, SoftPairs) else soft_pairs(labels, validate=False)
    check_rows("bank_labels", pairs.labels, entries)
    if validate:
        check_classes("bank_labels", pairs.labels, classes, least=-1)
        # The weights of an empty slot mean nothing.
        first = torch.tensor([1.0, 0.0], device=pairs.weights.device)
        filled = (pairs.labels[:, :1] >= 0) | (pairs.labels[:, 1:] >= 0)
        check_shares("bank_labels.weights", pairs.weights.where(filled, first))
    return pairs


def soft_pairs(labels: Labels, *, validate: bool = True) -> SoftPairs:
    """Labels as pairs of classes with weights; a single class y becomes (y, y) with weights (1, 0).

    labels: `[N]` integers, -1 for none, or `[N, C]` rows that sum to 1 with at most two non-zero
    entries. validate: raise ValueError for others; otherwise of more the two largest are taken unchanged.
    """
    if validate:
        check_shares("labels", labels) if labels.ndim == 2 else check_classes(
            "labels", labels, None, -1
        )
    if labels.ndim == 1:
        first = torch.ones_like(labels, dtype=torch.float32)
        weights = torch.stack([first, torch.zeros_like(first)], 1)
        return SoftPairs(torch.stack([labels, labels], 1), weights)
    # The column of zeros gives rows of a single class their second entry.
    weights, classes = F.pad(labels, (0, 1)).topk(2, dim=1)
    if validate:
        check_shares("the two largest of labels", weights)
    second = classes[:, 1].where(weights[:, 1] > 0, classes[:, 0])
    return SoftPairs(torch.stack([classes[:, 0], second], 1), weights)


def class_rows(labels: Labels, classes: int, dtype: torch.dtype) -> Float[Tensor, "n {classes}"]:
    """Labels as rows over the classes: integers one-hot, soft labels unchanged, no gradient."""
    if labels.ndim == 1:
        # torch's one_hot reads the largest label from the device, which synchronises.
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
    return labels.detach().to(dtype)


def hard_if_known(labels: Labels) -> Labels:
    """One-hot rows as integers, if the labels are on the CPU; on a GPU the look would synchronise."""
    if labels.ndim == 2 and labels.device.type == "cpu" and bool((labels.amax(1) == 1).all()):
        return labels.argmax(1)
    return labels


def shared_classes(
    labels: Labels, others: Int[Tensor, " m"] | Float[Tensor, "m c"], dtype: torch.dtype
) -> Float[Tensor, "n m"]:
    """a_ij = sum_c y_ic y_jc of samples with other samples: 1 or 0 when labels are hard.

    Clamped to [0, 1], which rounding may leave; carries no gradient. One-hot rows give exactly what
    their hard labels give.
    """
    if labels.ndim == 1:
        return (labels[:, None] == others).to(dtype)
    return (labels.detach().to(dtype) @ others.detach().to(dtype).T).clamp(0, 1)


def shared_with_bank(labels: Labels, pairs: SoftPairs) -> Float[Tensor, "n k"]:
    """a_ij = sum_c y_ic y_jc of samples with bank entries.

    pairs: `[K, 2]`, the same entries for every sample, or `[N, k, 2]`, different ones. The class
    -1 (an empty slot) equals no class. Carries no gradient.
    """
    first, second = (_share(labels.detach(), classes) for classes in pairs.labels.unbind(-1))
    weights = pairs.weights.detach()
    return (weights[..., 0] * first + weights[..., 1] * second).clamp(0, 1)


def _share(labels: Tensor, classes: Tensor) -> Tensor:
    """The weight of the classes `[K]` or `[N, k]` in each sample's label; 0 for class -1."""
    if labels.ndim == 1:
        return labels[:, None] == classes
    index = classes.clamp(min=0).long().expand(len(labels), -1)
    return labels.gather(1, index) * (classes >= 0)


def not_self(square: Tensor) -> Bool[Tensor, "n n"]:
    """False on the diagonal, True elsewhere."""
    return ~torch.eye(len(square), dtype=torch.bool, device=square.device)


def usable_entries(mask: Mask | None, scores: Float[Tensor, "n k"]) -> Bool[Tensor, "n k"]:
    """The mask for every pair of sample and bank entry; without a mask all entries may be used.

    Raises ValueError unless mask is `[N, K]` or `[K]`: broadcasting would hide the mistake.
    """
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if mask.shape not in (scores.shape, scores.shape[1:]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but must be {tuple(scores.shape)} "
            f"or {tuple(scores.shape[1:])}."
        )
    return mask.expand(scores.shape)


def log_sum(scores: Float[Tensor, "n k"], weights: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """log sum_j weights_ij e^(scores_ij); 0, with gradient 0, for a row whose weights are all 0.

    The same for a row whose weights lie on scores of -inf only. The caller masks these rows. They
    must not reach logsumexp, whose gradient is NaN where all is -inf.
    """
    weighted = scores + weights.log()
    empty = weighted.isneginf().all(1)
    return weighted.masked_fill(empty[:, None], 0).logsumexp(1).masked_fill(empty, 0)


def log_count(count: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log of a count; 0 where it is 0, since the caller masks those rows."""
    return count.where(count > 0, 1).log()


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` in float64 when its first argument is float64, else in float32, with autocast off.

    All floating tensors among the arguments are cast to that type. A cast is part of the graph, so
    gradients come back in the type of each input.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        leading = cast(Tensor, args[0] if args else kwargs[first])
        dtype = torch.float64 if leading.dtype == torch.float64 else torch.float32
        positional = [_in_dtype(value, dtype) for value in args]
        named = {name: _in_dtype(value, dtype) for name, value in kwargs.items()}
        with torch.autocast(leading.device.type, enabled=False):
            return cast(Callable[..., R], function)(*positional, **named)

    return run


def _in_dtype(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, SoftPairs):
        return SoftPairs(value.labels, value.weights.to(dtype))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def refuse_second_derivative() -> None:
    """Call first in the backward pass of an autograd function that has no second derivative.

    Raises RuntimeError under create_graph=True. torch's once_differentiable does so only when the upstream gradient has
    a graph, and else silently leaves the second derivative out.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The pairs of a large batch can be differentiated once only; "
            "create_graph=True needs a smaller batch."
        )
