"""Logits with a margin on the cosine of the sample's own class: CosFace and ArcFace."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nearkin.functional._checks import (
    check_amount,
    check_cosines,
    check_labels,
    check_positive,
    check_unit,
)
from nearkin.functional._common import Hard, class_rows, full_precision


@full_precision
def cosface_logits(
    features: Float[Tensor, "n d"],
    weight: Float[Tensor, "c d"],
    labels: Hard,
    *,
    margin: float,
    scale: float,
    validate: bool = True,
) -> Float[Tensor, "n c"]:
    """Cosines times scale, that of the own class minus a margin; for a cross-entropy.

        logit_ic = scale ( z_i . w_c/|w_c| - margin [c = y_i] )

    features: `[N, d]` rows of unit length. weight: `[C, d]` of any length. labels: `[N]` integers.
    margin is subtracted from the cosine. Raises ValueError when labels are not `[N]` integers.
    Source: Wang et al. 2018 (CosFace), equation 4.
    """
    cosine = _cosines(features, weight, labels, validate)
    return cosface_margin(cosine, labels, margin=margin, scale=scale, validate=False)


@full_precision
def arcface_logits(
    features: Float[Tensor, "n d"],
    weight: Float[Tensor, "c d"],
    labels: Hard,
    *,
    margin: float,
    scale: float,
    validate: bool = True,
) -> Float[Tensor, "n c"]:
    """Cosines times scale, the angle to the own class plus a margin; for a cross-entropy.

        logit_ic = scale cos( theta_ic + margin [c = y_i] ),   theta_ic = angle(z_i, w_c)

    Shapes and errors as in `cosface_logits`; margin in radians. The own logit decreases with theta
    only up to pi - margin, as in the paper.
    Source: Deng et al. 2019 (ArcFace), equation 3.
    """
    cosine = _cosines(features, weight, labels, validate)
    return arcface_margin(cosine, labels, margin=margin, scale=scale, validate=False)


@full_precision
def cosine_logits(
    features: Float[Tensor, "n d"], weight: Float[Tensor, "c d"], *, scale: float
) -> Float[Tensor, "n c"]:
    """Cosines times scale, without a margin: the logits of a margin softmax at evaluation.

        logit_ic = scale z_i/|z_i| . w_c/|w_c|

    features: `[N, d]` and weight: `[C, d]` rows of any length; a row of zeros has the cosine 0.
    Source: Wang et al. 2018 (CosFace), section 3.1.
    """
    _check_scale(scale)
    return scale * F.normalize(features, dim=1) @ F.normalize(weight, dim=1).T


@full_precision
def cosface_margin(
    cosine: Float[Tensor, "n c"],
    labels: Hard,
    *,
    margin: float,
    scale: float,
    validate: bool = True,
) -> Float[Tensor, "n c"]:
    """`cosface_logits` from given cosines `[N, C]`, within [-1, 1]. Errors as there."""
    _check_scale(scale)
    check_amount("margin", margin)
    return scale * (cosine - margin * _own(cosine, labels, validate))


@full_precision
def arcface_margin(
    cosine: Float[Tensor, "n c"],
    labels: Hard,
    *,
    margin: float,
    scale: float,
    validate: bool = True,
) -> Float[Tensor, "n c"]:
    """`arcface_logits` from given cosines `[N, C]`, within [-1, 1]. Errors as there."""
    _check_scale(scale)
    check_amount("margin", margin)
    own = _own(cosine, labels, validate)
    square = (1 - cosine) * (1 + cosine)
    # The root has an infinite gradient at 0, and rounding may make the square negative: both give 0.
    sine = square.where(square > 0, 1).sqrt().where(square > 0, 0)
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    return scale * shifted.where(own > 0, cosine)


def _check_scale(scale: float | Tensor) -> None:
    """Raises ValueError for a number that is not above 0. A tensor may be learned, and is not looked at."""
    if not isinstance(scale, Tensor):
        check_positive("scale", scale)


def _cosines(features: Tensor, weight: Tensor, labels: Tensor, validate: bool) -> Tensor:
    """The cosine of each sample with each class `[N, C]`."""
    check_labels(labels, len(features), hard=True, classes=len(weight), validate=validate)
    check_unit(validate, features=features)
    return features @ F.normalize(weight, dim=1).T


def _own(cosine: Tensor, labels: Tensor, validate: bool) -> Tensor:
    """1 at each sample's own class, `[N, C]`."""
    check_labels(labels, len(cosine), hard=True, classes=cosine.shape[1], validate=validate)
    if validate:
        check_cosines(cosine)
    return class_rows(labels, cosine.shape[1], cosine.dtype)
