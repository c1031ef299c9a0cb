"""Hard and soft labels, and how much two samples are of the same class."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Hard: TypeAlias = Int[Tensor, " n"]
Labels: TypeAlias = Int[Tensor, " n"] | Float[Tensor, "n c"]


class SoftPairs(NamedTuple):
    """At most two classes per sample.

    labels: `[K, 2]` integers, -1 for none. weights: `[K, 2]`, rows sum to 1.
    What a bank keeps of mixed images: `[K, C]` rows would take too much memory.
    """

    labels: Int[Tensor, "*k 2"]
    weights: Float[Tensor, "*k 2"]


BankLabels: TypeAlias = Int[Tensor, " k"] | SoftPairs


def soft_pairs(labels: Labels) -> SoftPairs:
    """Labels as pairs of classes with weights; a single class y becomes (y, y) with weights (1, 0).

    labels: `[N]` integers, or `[N, C]` rows that sum to 1 with at most two non-zero entries (of
    more, the two largest are kept as they are). Source: our choice.
    """
    if labels.ndim == 1:
        first = torch.ones_like(labels, dtype=torch.float32)
        weights = torch.stack([first, torch.zeros_like(first)], 1)
        return SoftPairs(torch.stack([labels, labels], 1), weights)
    # The column of zeros gives rows of a single class their second entry.
    weights, classes = F.pad(labels, (0, 1)).topk(2, dim=1)
    second = classes[:, 1].where(weights[:, 1] > 0, classes[:, 0])
    return SoftPairs(torch.stack([classes[:, 0], second], 1), weights)


def class_rows(labels: Labels, classes: int, dtype: torch.dtype) -> Float[Tensor, "n {classes}"]:
    """Labels as rows over the classes: integers one-hot, soft labels as they are, no gradient."""
    if labels.ndim == 1:
        # torch's one_hot asks the device for the largest label, and waits.
        return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
    if labels.shape[1] != classes:
        raise ValueError(f"labels have {labels.shape[1]} columns but the logits have {classes}.")
    return labels.detach().to(dtype)


def hard_if_known(labels: Labels) -> Labels:
    """Rows of one class each as integers, where it costs no waiting for a device to know."""
    if labels.ndim == 2 and labels.device.type == "cpu" and bool((labels.amax(1) == 1).all()):
        return labels.argmax(1)
    return labels


def positiveness(labels: Labels, dtype: torch.dtype) -> Float[Tensor, "n n"]:
    """a_ij = sum_c y_ic y_jc between the samples of a batch: 1 or 0 when labels are hard.

    Clamped to [0, 1], which rounding may leave; carries no gradient. One-hot rows give exactly what
    their hard labels give. Source: our choice.
    """
    return shared_classes(labels, labels, dtype)


def shared_classes(
    labels: Labels, others: Int[Tensor, " m"] | Float[Tensor, "m c"], dtype: torch.dtype
) -> Float[Tensor, "n m"]:
    """`positiveness` of samples with other ones."""
    if labels.ndim == 1:
        return (labels[:, None] == others).to(dtype)
    return (labels.detach().to(dtype) @ others.detach().to(dtype).T).clamp(0, 1)


def bank_positiveness(labels: Labels, pairs: SoftPairs) -> Float[Tensor, "n k"]:
    """a_ij = sum_c y_ic y_jc between samples and bank entries.

    pairs: `[K, 2]`, the same entries for every sample, or `[N, k, 2]`, each sample's own. The class
    -1 (an empty slot) is of no class. Carries no gradient.
    """
    first, second = (_share(labels.detach(), classes) for classes in pairs.labels.unbind(-1))
    weights = pairs.weights.detach()
    return (weights[..., 0] * first + weights[..., 1] * second).clamp(0, 1)


def _share(labels: Tensor, classes: Tensor) -> Tensor:
    """How much of each sample's label lies on the classes `[K]` or `[N, k]`; nothing on -1."""
    if labels.ndim == 1:
        return labels[:, None] == classes
    index = classes.clamp(min=0).long().expand(len(labels), -1)
    return labels.gather(1, index) * (classes >= 0)
