"""GPaCo: one softmax over class logits, the samples of the batch and a bank."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import (
    check_labels,
    check_positive,
    check_rows,
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
    log_sum,
    not_self,
    shared_classes,
    shared_with_bank,
    usable_entries,
)


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
    Raises ValueError when temperature, smoothing or a shape is wrong.
    Source: Cui et al. 2023 (GPaCo) and its code, without soft labels and mask.
    """
    check_positive("temperature", temperature)
    check_smoothing(smoothing)
    check_rows("logits", logits, len(features))
    classes = logits.shape[1]
    check_labels(labels, len(features), classes=classes, validate=validate)
    pairs = bank_pairs(bank_labels, len(bank), classes, validate=validate)
    if validate:
        check_unit(features=features)
        check_unit(bank=bank, zeros=True)

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


def _class_weights(labels: Tensor, logits: Tensor, smoothing: float) -> Tensor:
    """1 - smoothing on the label, the rest spread evenly over the other classes. `[N, C]`."""
    classes = logits.shape[1]
    own = class_rows(labels, classes, logits.dtype)
    return (1 - smoothing) * own + smoothing / max(classes - 1, 1) * (1 - own)
