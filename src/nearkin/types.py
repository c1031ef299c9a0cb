"""The values that travel between the rooms. Importing this file imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Batch(NamedTuple):
    """What a step learns from.

    images: `[V, B, channels, H, W]`, V views of B images; uint8 from the loader, float in [0, 1] after mixing.
    labels: `[B]` class numbers, or `[B, C]` rows that sum to 1 when images are mixed.
    index:  `[B]` sample ids (the row in the training split), or `[B, 2]` with the mixing partner's id second.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which nobody needs here


class Outputs(NamedTuple):
    """What the network says of N = V * B images, view after view (row v * B + b is view v of image b).

    features:   `[N, d]` pooled features of the backbone.
    embedding:  `[N, e]` the representation that the classifier reads; the features unless a head writes it.
    projection: `[N, p]` output of a head that only contrasts, or None.
    logits:     `[N, C]` class logits, or None in a stage without a classifier.
    """

    features: Tensor
    embedding: Tensor
    projection: Tensor | None
    logits: Tensor | None


class Loss(NamedTuple):
    """total: the scalar to minimise, with gradient.

    terms, counts: detached scalars for the journal, on the device; terms are averaged over steps, counts summed.
    """

    total: Tensor
    terms: dict[str, Tensor]
    counts: Mapping[str, Tensor] = MappingProxyType({})


class Predictions(NamedTuple):
    """The most probable classes of each image of a split, on the CPU, in the order of the split. K = min(5, C).

    top: `[N, K]` int64 class numbers, most probable first. probabilities: `[N, K]` their probabilities.
    own: `[N]` probability of the label; NaN where a probability of the image is not finite.
    labels: `[N]` int64. index: `[N]` int64, the row in the split.
    """

    top: Tensor
    probabilities: Tensor
    own: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which nobody needs here


class Progress(NamedTuple):
    """Where the training stands inside its stage. Steps are optimiser steps; both counters start at 0."""

    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int


class Facts(NamedTuple):
    """What `auto` values are resolved from: the training images after the splits, and the network's width."""

    images: int
    classes: int
    batch_size: int
    image_size: int
    dim: int
