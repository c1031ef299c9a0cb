"""Contrast between samples: SupCon in its two forms, SINCERE, SCHaNe, sigmoid pairs, instances and GPaCo."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import (
    check_amount,
    check_labels,
    check_positive,
    check_rows,
    check_same_shape,
    check_smoothing,
    check_unit,
)
from nearkin.functional._common import (
    BankLabels,
    Labels,
    Mask,
    PerAnchor,
    all_valid,
    bank_pairs,
    class_rows,
    full_precision,
    log_count,
    log_sum,
    masked,
    not_self,
    shared_classes,
    shared_with_bank,
    usable_entries,
)
from nearkin.functional._pairs import (
    Count,
    LogSum,
    Number,
    Total,
    pair_sums,
    sigmoid_sum,
    softplus_sum,
)


@full_precision
def supcon_out(
    features: Float[Tensor, "n d"], labels: Labels, *, temperature: float, validate: bool = True
) -> PerAnchor:
    """Supervised contrast with the mean outside the logarithm (L_out).

        L_i = 1/|P_i| sum_{p != i} a_ip ( LSE_{k != i}(s_ik) - s_ip ),   |P_i| = sum_{p != i} a_ip

    with s = z z' / temperature and a_ij = sum_c y_ic y_jc, 1 or 0 when labels are hard. There is no
    base-temperature factor.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1. temperature > 0.
    Invalid: an anchor without a positive (total positiveness over the others is 0).
    Raises ValueError when temperature or the shape of labels is wrong.
    Source: Khosla et al. 2020, equation 2; soft labels as in GenSCL (2022); the paper has no invalid anchors.
    """
    _check(features, labels, temperature, validate)
    terms = LogSum("others"), Total("positives"), Count("positives")
    all_others, attraction, count = pair_sums(features, labels, temperature, *terms)
    valid = count > 0
    return masked(all_others - attraction / count.where(valid, 1), valid)


@full_precision
def supcon_in(
    features: Float[Tensor, "n d"], labels: Labels, *, temperature: float, validate: bool = True
) -> PerAnchor:
    """Supervised contrast with the mean inside the logarithm (L_in).

        L_i = -log( 1/|P_i| sum_{p != i} a_ip e^(s_ip) / sum_{k != i} e^(s_ik) )

    Shapes, symbols, validity and errors as in `supcon_out`. Source: Khosla et al. 2020, equation 3.
    """
    _check(features, labels, temperature, validate)
    terms = LogSum("others"), LogSum("positives"), Count("positives")
    all_others, positives, count = pair_sums(features, labels, temperature, *terms)
    return masked(all_others - positives + log_count(count), count > 0)


@full_precision
def sincere(
    features: Float[Tensor, "n d"], labels: Labels, *, temperature: float, validate: bool = True
) -> PerAnchor:
    """Supervised InfoNCE: each positive against the other classes, without the other positives.

        L_i = -1/|P_i| sum_{p != i} a_ip log( e^(s_ip) / (e^(s_ip) + N_i) )
            = 1/|P_i| sum_{p != i} a_ip softplus( log N_i - s_ip )
        N_i = sum_{n != i} (1 - a_in) e^(s_in)

    Shapes, symbols and errors as in `supcon_out`. Invalid: an anchor without a positive. Without a negative its value
    is 0 and it is valid. Source: Feeney and Hughes 2023 (SINCERE), without soft labels.
    """
    _check(features, labels, temperature, validate)
    terms = LogSum("negatives"), Count("positives"), Count("negatives")
    negatives, count, negative_count = pair_sums(features, labels, temperature, *terms)
    valid = count > 0
    mean = softplus_sum(features, labels, temperature, negatives) / count.where(valid, 1)
    return masked(mean.where(negative_count > 0, 0), valid)


@full_precision
def schane(
    features: Float[Tensor, "n d"],
    labels: Labels,
    *,
    temperature: float,
    hardness: float,
    positives: Literal["mean", "sum"] = "mean",
    validate: bool = True,
) -> PerAnchor:
    """Supervised contrast with hard negatives.

        P_i  = mean (or sum) over P(i) of e^(s_ip)
        w_in = e^(h s_in) / mean over N(i) of e^(h s_ik)
        L_i  = -log( P_i / (P_i + sum over N(i) of w_in e^(s_in)) )
             = softplus( LSE_N((1 + h) s) - LSE_N(h s) + log|N| - log P_i )

    with s = z z' / temperature and h the hardness; the gradient flows through the weights w. With soft labels all sums
    and counts over P(i) are weighed with a_ij = sum_c y_ic y_jc, those over N(i) with 1 - a_ij.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1. temperature > 0.
    hardness >= 0: 0 weighs all negatives alike, as published 1. positives: "mean", or "sum" as in the later CLCE.
    Invalid: an anchor without a positive. Without a negative its value is 0 and it is valid. Raises ValueError when
    temperature, hardness, positives or the shape of labels is wrong. Source: arXiv 2308.14893 and its code; "sum" arXiv
    2402.14551; without soft labels and invalid anchors.
    """
    if positives not in ("mean", "sum"):
        raise ValueError(f'positives is {positives!r} but must be "mean" or "sum".')
    check_amount("hardness", hardness)
    _check(features, labels, temperature, validate)
    positive, steeper, weights, positive_count, negative_count = pair_sums(
        features,
        labels,
        temperature,
        LogSum("positives"),
        LogSum("negatives", 1 + hardness),
        LogSum("negatives", hardness),
        Count("positives"),
        Count("negatives"),
    )
    attraction = positive - (log_count(positive_count) if positives == "mean" else 0)
    repulsion = steeper - weights + log_count(negative_count)
    value = F.softplus(repulsion - attraction).where(negative_count > 0, 0)
    return masked(value, positive_count > 0)


@full_precision
def sigsup(
    features: Float[Tensor, "n d"],
    labels: Labels,
    *,
    log_scale: Number,
    bias: Number,
    normalise: Literal["positives", "none"] = "positives",
    validate: bool = True,
) -> PerAnchor:
    """Supervised contrast by pairs: each pair alone is classified as of one class or of two.

        L_i  = 1/m_i sum_{j != i} a_ij softplus(-s_ij) + (1 - a_ij) softplus(s_ij)
        s_ij = e^(log_scale) z_i . z_j + bias
        m_i  = max(1, |P_i|), or 1 without normalisation,   |P_i| = sum_{j != i} a_ij

    With hard labels a term is softplus(-s_ij) in a class and softplus(s_ij) between classes. Two views of an image are
    a pair of one class. The gradient flows into log_scale and bias, which are meant to be learned.

    features: `[N, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1. log_scale, bias: any
    finite numbers, or tensors without dimensions; SigLIP starts them at log 10 and -10. normalise: "positives" keeps
    the value independent of the number of images per class; "none" is the published sum.
    Invalid: the only sample of a batch. Without a positive or a negative the other pairs remain, and it is valid.
    Raises ValueError when normalise or the shape of labels is wrong.
    Source: SigLIP (arXiv 2303.15343), algorithm 1, which sums over all pairs and divides by the batch size, with one
    positive per anchor: there m_i is 1 as well. With labels: arXiv 2512.17954, whose term on style distances is left
    out. From neither: m_i for several positives, soft labels, and no pair of a sample with itself, which images and
    texts do not have.
    """
    if normalise not in ("positives", "none"):
        raise ValueError(f'normalise is {normalise!r} but must be "positives" or "none".')
    check_labels(labels, len(features), validate=validate)
    check_unit(validate, features=features)
    for name, number in (("log_scale", log_scale), ("bias", bias)):
        if isinstance(number, Tensor) and number.ndim > 0:
            raise ValueError(f"{name} has shape {tuple(number.shape)} but must be one number, [].")
    scale = log_scale.exp() if isinstance(log_scale, Tensor) else math.exp(log_scale)
    value = sigmoid_sum(features, labels, scale, bias)
    if normalise == "positives":
        (count,) = pair_sums(features, labels, 1.0, Count("positives"))
        value = value / count.detach().clamp(min=1)
    return masked(value, torch.full_like(value, len(features) > 1, dtype=torch.bool))


def instance_nce(
    view1: Float[Tensor, "b d"],
    view2: Float[Tensor, "b d"],
    *,
    temperature: float,
    validate: bool = True,
) -> PerAnchor:
    """Instance discrimination: an image's other view against all other images, own class included.

        L_i = LSE_{k != i}(s_ik) - s_ij,   j the other view of i, over the 2B rows [view1; view2]

    view1, view2: `[B, d]` rows of unit length, row b of both from image b. temperature > 0.
    Returns 2B anchors, view1's first; all are valid. Raises ValueError when the views differ in
    size or temperature is wrong. Source: Chen et al. 2020 (SimCLR), equation 1.
    """
    check_same_shape("view2", view2, "view1", view1)
    check_unit(validate, view1=view1, view2=view2)
    images = torch.arange(len(view1), device=view1.device).repeat(2)
    # Each image is a class: its only positive is its other view.
    return supcon_out(torch.cat([view1, view2]), images, temperature=temperature, validate=False)


@full_precision
def instance_nce_bank(
    query: Float[Tensor, "n d"],
    key: Float[Tensor, "n d"],
    bank: Float[Tensor, "k d"],
    *,
    temperature: float,
    mask: Mask | None = None,
    validate: bool = True,
) -> PerAnchor:
    """Instance discrimination against a bank: an image's other view against other images' keys.

        L_i = log( e^(q_i . k_i / T) + sum_j e^(q_i . b_j / T) ) - q_i . k_i / T,   T the temperature

    query, key: `[N, d]` unit rows, row i both from image i; no gradient flows into key. bank: `[K, d]` unit rows. mask:
    `[N, K]` or `[K]`, True where an entry may be used: no empty slot and no earlier copy of the image. temperature > 0.
    All anchors are valid; without an entry the value is 0. Raises ValueError when a shape or temperature is wrong.
    Source: He et al. 2020 (MoCo), equation 1, without a mask.
    """
    check_positive("temperature", temperature)
    check_same_shape("key", key, "query", query)
    check_unit(validate, query=query, key=key)
    check_unit(validate, bank=bank, zeros=True)
    own = (query * key.detach()).sum(1, keepdim=True) / temperature
    others = query @ bank.T / temperature
    others = others.masked_fill(~usable_entries(mask, others), -torch.inf)
    return all_valid(-torch.cat([own, others], 1).log_softmax(1)[:, 0])


@full_precision
def gpaco(
    features: Float[Tensor, "n d"],
    labels: Labels,
    logits: Float[Tensor, "n c"],
    bank: Float[Tensor, "k d"],
    bank_labels: BankLabels,
    *,
    alpha: float,
    temperature: float,
    smoothing: float,
    mask: Mask | None = None,
    validate: bool = True,
) -> PerAnchor:
    """Parametric contrast: class logits and same-class samples compete in one softmax.

        p_i = softmax over [logits_i; z_i . z_j / T, j != i; z_i . b_k / T]
        v_i = [ (1 - s) y_ic + s/(C - 1) (1 - y_ic); alpha a_ij; alpha a_ik ]
        L_i = -sum(v_i log p_i) / sum(v_i)

    with a_ij = sum_c y_ic y_jc, 1 or 0 when labels are hard, T the temperature and s the smoothing,
    as published spread over the other C - 1 classes.

    features: `[N, d]` and bank: `[K, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    logits: `[N, C]`. bank_labels: `[K]` integers or `SoftPairs`; -1 equals no class. mask: `[N, K]` or `[K]`, True
    where a bank entry may be used. temperature > 0, smoothing in [0, 1). All anchors are valid.
    Raises ValueError when temperature, alpha, smoothing or a shape is wrong. Memory: about 2.5 N (K + N) numbers for
    the backward pass. Source: Cui et al. 2023 (GPaCo) and its code, without soft labels and mask.
    """
    check_positive("temperature", temperature)
    check_amount("alpha", alpha)
    check_smoothing(smoothing)
    check_rows("logits", logits, len(features))
    classes = logits.shape[1]
    check_labels(labels, len(features), classes=classes, validate=validate)
    pairs = bank_pairs(bank_labels, len(bank), classes, validate=validate)
    check_unit(validate, features=features)
    check_unit(validate, bank=bank, zeros=True)

    batch = features @ features.T / temperature
    stored = features @ bank.T / temperature
    scores = torch.cat([logits, batch, stored], 1)
    present = torch.cat([torch.ones_like(logits), not_self(batch), usable_entries(mask, stored)], 1)
    positive = torch.cat(
        [shared_classes(labels, labels, batch.dtype), shared_with_bank(labels, pairs)], 1
    )
    weights = torch.cat([_class_weights(labels, logits, smoothing), alpha * positive], 1) * present
    # log p = scores - LSE, in two sums: a masked entry gives 0 * score, never 0 * -inf.
    value = log_sum(scores, present) - (weights * scores).sum(1) / weights.sum(1)
    return all_valid(value)


def _check(features: Tensor, labels: Labels, temperature: float, validate: bool) -> None:
    check_positive("temperature", temperature)
    check_labels(labels, len(features), validate=validate)
    check_unit(validate, features=features)


def _class_weights(labels: Tensor, logits: Tensor, smoothing: float) -> Tensor:
    """1 - smoothing on the label, the rest spread evenly over the other classes. `[N, C]`."""
    classes = logits.shape[1]
    own = class_rows(labels, classes, logits.dtype)
    return (1 - smoothing) * own + smoothing / max(classes - 1, 1) * (1 - own)
