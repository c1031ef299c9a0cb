"""Values passed between packages. Importing this file imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Batch(NamedTuple):
    """The images and labels of one step.

    images: `[V, B, channels, H, W]`, V views of B images; uint8 from the loader, float in [0, 1] after mixing.
    labels: `[B]` class numbers, or `[B, C]` rows that sum to 1 when images are mixed.
    index:  `[B]` sample ids (the row in the training split), or `[B, 2]` with the mixing partner's id second.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which is not used


class Outputs(NamedTuple):
    """Outputs of the network for N = V * B images, view after view (row v * B + b is view v of image b).

    features:   `[N, d]` pooled features of the backbone.
    embedding:  `[N, e]` by which images are compared; the features unless a head writes it.
    projection: `[N, p]` output of a head for the contrastive loss only, or None.
    logits:     `[N, C]` class logits, or None in a stage without a classifier.
    scale_bias: `[N, 2]` two learned numbers of a loss of pairs, log of the scale and bias, the same in every row, or
        None. As rows they are gathered and back-propagated as all outputs are.
    """

    features: Tensor
    embedding: Tensor
    projection: Tensor | None
    logits: Tensor | None
    scale_bias: Tensor | None = None


class Loss(NamedTuple):
    """total: the scalar to minimise, with gradient.

    terms, counts: detached scalars for the log, on the device; terms are averaged over steps, counts summed.
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
    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which is not used


@dataclass(frozen=True)
class Result:
    """A finished training run.

    run: its folder. test_top1: accuracy on the test split, in [0, 1]; None without one. metrics: of the test split,
    else of the validation split (`metrics["split"]` names it); empty without either.
    """

    run: Path
    test_top1: float | None
    metrics: dict[str, Any]

    @classmethod
    def of(cls, run: Path, metrics: dict[str, Any]) -> Result:
        """The result with these metrics; `test_top1` is never that of another split."""
        return cls(run, metrics["top1"] if metrics.get("split") == "test" else None, metrics)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"run": str(self.run), "test_top1": self.test_top1, "metrics": self.metrics}


class Progress(NamedTuple):
    """Position inside the current stage, by the name that it has in `Objective.stages()`. Steps are optimiser steps;
    both counters start at 0."""

    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int


class Facts(NamedTuple):
    """What an objective's `auto` options are resolved from.

    dim: width of the backbone's features. images: training images after the splits. batch_size: images per step over
    all processes. device: its type; decides what the bank stores. pretrained: whether the backbone is.
    """

    dim: int
    classes: int
    images: int
    batch_size: int
    device: str = "cpu"
    pretrained: bool = False
