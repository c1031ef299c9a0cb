"""Cross-entropy and its symmetric form."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import check_amount, check_labels, check_rows, check_smoothing
from nearkin.functional._common import Labels, PerAnchor, all_valid, class_rows, full_precision

LEAST_PROBABILITY = 1e-7  # as published: predictions are clipped to [1e-7, 1]
LOG_OF_ZERO = math.log(1e-4)  # as published: replaces log 0 on the classes that are not the label


@full_precision
def cross_entropy(
    logits: Float[Tensor, "n c"],
    labels: Labels,
    *,
    smoothing: float = 0.0,
    class_weights: Float[Tensor, " c"] | None = None,
    validate: bool = True,
) -> PerAnchor:
    """Cross-entropy with label smoothing and class weights.

        L_i = -sum_c w_c ( (1 - s) y_ic + s/C ) log softmax_c(logits_i)

    logits: `[N, C]`, finite. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    smoothing: s, in [0, 1), torch's form. class_weights: w, `[C]`; the values are not divided by them. All anchors are
    valid. Raises ValueError when smoothing or the shape of labels is wrong. Source: Szegedy et al. 2016, section 7.
    """
    check_labels(labels, len(logits), classes=logits.shape[1], validate=validate)
    check_smoothing(smoothing)
    target = class_rows(labels, logits.shape[1], logits.dtype)
    value = F.cross_entropy(
        logits, target, weight=class_weights, label_smoothing=smoothing, reduction="none"
    )
    return all_valid(value)


@full_precision
def binary_cross_entropy(
    logits: Float[Tensor, "n c"],
    labels: Labels,
    *,
    smoothing: float = 0.0,
    class_weights: Float[Tensor, " c"] | None = None,
    validate: bool = True,
) -> PerAnchor:
    """Binary cross-entropy of each class, averaged over the classes, with label smoothing and class weights.

        L_i = -1/C sum_c w_c ( t_ic log sigmoid(l_ic) + (1 - t_ic) log sigmoid(-l_ic) )
        t_ic = (1 - s) y_ic + s/C

    logits: `[N, C]`. labels: `[N]` integers or `[N, C]` rows that sum to 1 (rows of
    several labels need validate=False). smoothing: s, in [0, 1).
    class_weights: w, `[C]`; the values are not divided by them. All anchors are valid.
    Raises ValueError when smoothing or the shape of labels is wrong.
    Source: Wightman et al. 2021 (arXiv 2110.00476), section 2; the mean over classes as in timm.
    """
    check_labels(labels, len(logits), classes=logits.shape[1], validate=validate)
    check_smoothing(smoothing)
    classes = logits.shape[1]
    if class_weights is not None:
        check_rows("class_weights", class_weights, classes)
    target = (1 - smoothing) * class_rows(labels, classes, logits.dtype) + smoothing / classes
    value = F.binary_cross_entropy_with_logits(
        logits, target, weight=class_weights, reduction="none"
    )
    return all_valid(value.mean(1))


@full_precision
def symmetric_ce(
    logits: Float[Tensor, "n c"],
    labels: Labels,
    *,
    alpha: float,
    beta: float,
    validate: bool = True,
) -> PerAnchor:
    """Cross-entropy plus reverse cross-entropy (prediction and label exchanged): robust to wrong labels.

        L_i = alpha CE_i + beta RCE_i
        CE_i  = -sum_c y_ic log p_ic
        RCE_i = -log(1e-4) sum_c (1 - y_ic) clip(p_ic, 1e-7, 1)

    RCE is -sum_c p_ic log max(y_ic, 1e-4) for hard labels and linear in y for soft ones.

    logits: `[N, C]`, finite, p their softmax. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    All anchors are valid. Raises ValueError when a weight is negative or the shape of labels is wrong.
    Source: Wang et al. 2019 and their code; presets (alpha, beta) (0.1, 1) for about 10 classes, (6, 0.1) for 100.
    """
    check_labels(labels, len(logits), classes=logits.shape[1], validate=validate)
    check_amount("alpha", alpha)
    check_amount("beta", beta)
    target = class_rows(labels, logits.shape[1], logits.dtype)
    log_p = logits.log_softmax(1)
    forward = -(target * log_p).sum(1)
    reverse = -LOG_OF_ZERO * ((1 - target) * log_p.exp().clamp(LEAST_PROBABILITY, 1)).sum(1)
    return all_valid(alpha * forward + beta * reverse)
