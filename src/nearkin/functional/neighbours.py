"""CoNe: attention of a sample over its nearest neighbours in a bank. These are its equations one by one; training takes
both terms at once from `_bank_attention`, which is faster and tested to be equal."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import (
    check_labels,
    check_positive,
    check_rows,
    check_same_shape,
    check_shares,
    check_unit,
)
from nearkin.functional._common import (
    BankLabels,
    Labels,
    Mask,
    PerAnchor,
    SoftPairs,
    all_valid,
    bank_pairs,
    full_precision,
    log_sum,
    masked,
    shared_with_bank,
    usable_entries,
)

LEAST_MASS = (
    1e-8  # as published: an anchor whose class has no more attention than this adds nothing
)


@full_precision
def neighbour_nll(
    query: Float[Tensor, "n d"],
    labels: Labels,
    bank: Float[Tensor, "k d"],
    bank_labels: BankLabels,
    *,
    temperature: float,
    topk: int,
    mask: Mask | None = None,
    validate: bool = True,
) -> PerAnchor:
    """Negative log of the attention on a sample's own class among its nearest neighbours.

        T_i  = the topk usable entries of largest z_i . b_j
        w_ij = softmax over T_i of z_i . b_j / temperature
        g_i  = sum over T_i of w_ij a_ij
        L_i  = -log g_i where g_i > 1e-8, else 0

    with a_ij = sum_c y_ic y_jc, 1 or 0 when labels are hard.

    query: `[N, d]` and bank: `[K, d]` rows of unit length. labels: `[N]` integers or `[N, C]` rows that sum to 1.
    bank_labels: `[K]` integers or `SoftPairs`; -1 is an entry of no class. mask: `[N, K]` or `[K]`, True where an entry
    may be used; without it empty slots take a share of the attention. temperature > 0. topk >= 1; more than there are
    usable entries means all of them.
    Invalid: an anchor to which the mask leaves no entry. One without a positive neighbour is valid with value 0.
    Raises ValueError when temperature, topk or a shape is wrong.
    Source: CoNe, arXiv 2308.10761, and its code, without soft labels and mask.
    """
    check_positive("topk", topk)
    check_labels(labels, len(query), validate=validate)
    classes = labels.shape[1] if labels.ndim == 2 else None
    pairs = bank_pairs(bank_labels, len(bank), classes, validate=validate)
    check_unit(validate, query=query)
    check_unit(validate, bank=bank, zeros=True)
    scores, usable = _bank_scores(query, bank, temperature, mask)
    nearest, index = scores.topk(min(topk, len(bank)), dim=1)
    positive = shared_with_bank(labels, SoftPairs(pairs.labels[index], pairs.weights[index]))
    # Without a positive neighbour `log_sum` gives 0, which is the value defined for that case.
    log_mass = log_sum(nearest.log_softmax(1), positive)
    return masked((-log_mass).where(log_mass > math.log(LEAST_MASS), 0), usable)


@full_precision
def neighbour_target(
    key: Float[Tensor, "n d"],
    bank: Float[Tensor, "k d"],
    bank_probs: Float[Tensor, "k c"],
    *,
    temperature: float,
    mask: Mask | None = None,
    validate: bool = True,
) -> Float[Tensor, "n c"]:
    """The class distribution of a sample's neighbours, by attention over the bank; no gradient.

        d_i = sum_j softmax_j( key_i . b_j / temperature ) p_j

    key: `[N, d]` and bank: `[K, d]` rows of unit length. bank_probs: `[K, C]` rows that sum to 1, or to 0 in empty
    slots. mask: `[N, K]` or `[K]`, True where an entry may be used; without it empty slots take a share of the
    attention. temperature > 0.
    Raises ValueError when temperature or a shape is wrong.
    A sample to which the mask leaves no entry gets a row of
    zeros, for which `consistency_kl` is 0 with gradient 0 (a uniform row would pull towards uniform predictions).
    Source: CoNe, arXiv 2308.10761, and its code, without a mask.
    """
    check_rows("bank_probs", bank_probs, len(bank))
    check_unit(validate, key=key)
    check_unit(validate, bank=bank, zeros=True)
    if validate:
        check_shares("bank_probs", bank_probs, zeros=True)
    with torch.no_grad():
        scores, usable = _bank_scores(key, bank, temperature, mask)
        return (scores.softmax(1) @ bank_probs) * usable[:, None]


@full_precision
def consistency_kl(
    logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"], *, validate: bool = True
) -> PerAnchor:
    """How far the predicted class distribution is from a target.

        L_i = sum_c d_ic ( log d_ic - log softmax_c(logits_i) ),   0 log 0 = 0

    logits: `[N, C]`. target: `[N, C]` rows that sum to 1; no gradient flows into it. All anchors are valid.
    Raises ValueError when the shapes differ. Source: CoNe, arXiv 2308.10761, and its code.
    """
    check_same_shape("target", target, "logits", logits)
    if validate:
        check_shares("target", target, zeros=True)
    target = target.detach()
    log_p = logits.log_softmax(1).masked_fill(target == 0, 0)  # of a masked class it is -inf
    value = (torch.xlogy(target, target) - target * log_p).sum(1)
    return all_valid(value)


def _bank_scores(
    rows: Tensor, bank: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """rows . bank / temperature `[N, K]`, -inf where masked, and whether any entry is usable `[N]`.

    A row without one is all 0, not all -inf: the gradient of a softmax over -inf alone is NaN.
    """
    check_positive("temperature", temperature)
    scores = rows @ bank.T / temperature
    allowed = usable_entries(mask, scores)
    usable = allowed.any(1)
    return scores.masked_fill(~allowed, -torch.inf).masked_fill(~usable[:, None], 0), usable
