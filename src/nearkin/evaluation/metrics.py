"""Exact metrics of a split, from the few numbers that each image needs, and the tables of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.errors import DataError, DivergedError
from nearkin.evaluation.results import Averages, ClassMetrics, Confused, Metrics
from nearkin.files import write_csv
from nearkin.types import Predictions

TOP = 5
BINS = 15
SMALLEST = 1e-12


def ranked(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The min(5, C) most probable classes of each row of `[B, C]` and their probabilities, both `[B, min(5, C)]`.

    Of equally probable classes the lower number comes first: `argmax` returns the first maximum, `topk` promises no
    order. A row that is not finite gives arbitrary classes.
    """
    rest, order = probabilities.clone(), []
    for _ in range(min(TOP, probabilities.shape[1])):
        order.append(rest.argmax(1, keepdim=True))
        rest.scatter_(1, order[-1], -1.0)
    top = torch.cat(order, 1)
    return top, probabilities.gather(1, top)


def reduced(probabilities: Tensor, labels: Tensor, index: Tensor) -> Predictions:
    """What the metrics need of probabilities `[B, C]`: no more than `min(5, C)` classes an image are kept.

    labels: `[B]` class numbers. index: `[B]` rows of the split.
    """
    top, values = ranked(probabilities)
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    own = own.where(probabilities.sum(1).isfinite(), torch.nan)  # 0.3 ms; isfinite().all(1) 5.8
    return Predictions(top, values, own, labels, index)


def top1_and_log_loss(predictions: Predictions) -> tuple[float, float]:
    """The share of images whose most probable class is the label, and -mean ln max(p_label, 1e-12) in nats.

    Raises DataError for a split without images, DivergedError when a probability is not finite.
    """
    labels, own = predictions.labels, predictions.own.double()
    if len(labels) == 0:
        raise DataError("The split has no images to evaluate; choose another split.")
    broken = int((~own.isfinite()).sum())
    if broken:
        raise DivergedError(
            f"The probabilities of {broken} of {len(labels)} images are not finite; "
            "train anew with a lower --lr, --clip-grad 1 or --precision fp32."
        )
    hits = (predictions.top[:, 0] == labels).double().mean()
    return float(hits), float(-own.clamp(min=SMALLEST).log().mean())


def summarise(predictions: Predictions, classes: Sequence[str]) -> Metrics:
    """Every metric of a split. Time and memory grow with the images and the classes, not with the square of either.

    Precision, recall and F1 are scikit-learn's. Raises as `top1_and_log_loss`.
    """
    from sklearn.metrics import precision_recall_fscore_support

    top1, log_loss = top1_and_log_loss(predictions)
    labels, top = predictions.labels.numpy(), predictions.top.numpy()
    numbers = np.arange(len(classes))
    *rates, support = precision_recall_fscore_support(
        labels, top[:, 0], labels=numbers, zero_division=0
    )
    present = support > 0
    columns = [column.tolist() for column in (*rates, support.astype(np.int64))]
    hits = top[:, 0] == labels
    return Metrics(
        n=len(labels),
        top1=top1,
        top5=float((top == labels[:, None]).any(1).mean()),
        log_loss=log_loss,
        ece=calibration_error(predictions.probabilities[:, 0].double().numpy(), hits),
        macro=Averages(*(float(column[present].mean()) for column in rates)),
        per_class=tuple(ClassMetrics(*row) for row in zip(classes, *columns, strict=True)),
        confusion=_confusion(labels, top[:, 0], classes),
    )


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> tuple[Confused, ...]:
    pairs, counts = np.unique(labels * len(classes) + predicted, return_counts=True)
    true, false = (part.tolist() for part in np.divmod(pairs, len(classes)))
    rows = zip(true, false, counts.tolist(), strict=True)
    return tuple(Confused(classes[t], classes[p], count) for t, p, count in rows)


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error, sum_b |B_b| / n * |accuracy(B_b) - confidence(B_b)|, in [0, 1].

    confidence: `[n]` the top probability. correct: `[n]`. B_b holds the confidences in (b/15,
    (b+1)/15], b = 0 ... 14; 0 belongs to the first. Source: Guo et al. 2017 (arXiv 1706.04599),
    equation 3.
    """
    edges = np.arange(1, BINS) / BINS
    bins = np.searchsorted(edges, confidence, side="left")
    # |B| cancels: each bin adds |number correct - sum of confidences| / n.
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def write_predictions(
    path: Path, predictions: Predictions, names: Sequence[str], classes: Sequence[str]
) -> None:
    """Write a CSV: path, label, its probability, predicted, its probability, and top5 as JSON in a cell.

    names: the path of every row of the split; `predictions.index` picks from them. top5: up to five
    pairs `[class, probability]`, most probable first. Raises SaveFailed.
    """
    columns = (
        predictions.index,
        predictions.labels,
        predictions.own,
        predictions.top,
        predictions.probabilities,
    )
    rows = (
        (
            names[row],
            classes[label],
            own,
            classes[top[0]],
            values[0],
            json.dumps([[classes[c], value] for c, value in zip(top, values, strict=True)]),
        )
        for row, label, own, top, values in zip(*(c.tolist() for c in columns), strict=True)
    )
    write_csv(
        path, ("path", "label", "label_probability", "predicted", "probability", "top5"), rows
    )


def write_tables(folder: Path, name: str, metrics: Metrics) -> tuple[Path, Path]:
    """Write `confusion-NAME.csv` (the counts that are not zero) and `classes-NAME.csv`. Raises SaveFailed."""
    confusion, classes = folder / f"confusion-{name}.csv", folder / f"classes-{name}.csv"
    write_csv(confusion, ("true", "predicted", "count"), metrics.confusion)
    write_csv(classes, ("class", *ClassMetrics._fields[1:]), metrics.per_class)
    return confusion, classes
