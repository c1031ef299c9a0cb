"""Metrics of a whole split, computed once, exactly, in float64; and the predictions as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin.errors import DataError, DivergedError, ModelError
from nearkin.files import write_atomic
from nearkin.types import Predictions

BINS = 15
SMALLEST = 1e-12
COLUMNS = ("path", "label", "predicted", "probability", "top5")


def summarise(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Every metric of a split as plain numbers for JSON; fractions in [0, 1], nothing rounded.

    n: images. top1: share whose most probable class is the label. top5: share whose label is among
    the min(5, C) most probable, so 1 for C <= 5; of equally probable classes the lower number comes
    first. per_class: in class order precision, recall, f1 and support; 0 where the denominator is
    0. macro: their mean over the classes that occur in the split (our choice: the recall of an
    absent class is no number). confusion: `[C][C]` counts, row = label, column = predicted.
    log_loss: -mean ln max(p_label, 1e-12), in nats. ece: `calibration_error`.

    Raises DataError for an empty split or a label outside the classes, ModelError when the number
    of classes does not fit, DivergedError when a probability is not finite.
    """
    probabilities, labels = _checked(predictions, len(classes))
    order = _ranked(probabilities)
    confusion = _confusion(labels, order[:, 0], len(classes))
    precision, recall, f1 = _rates(confusion)
    support = confusion.sum(1)
    present = support > 0
    own = probabilities[np.arange(len(labels)), labels]
    return {
        "n": len(labels),
        "top1": float((order[:, 0] == labels).mean()),
        "top5": float((order[:, :5] == labels[:, None]).any(1).mean()),
        "macro": {
            "precision": float(precision[present].mean()),
            "recall": float(recall[present].mean()),
            "f1": float(f1[present].mean()),
        },
        "log_loss": float(-np.log(np.maximum(own, SMALLEST)).mean()),
        "ece": calibration_error(probabilities.max(1), order[:, 0] == labels),
        "per_class": [
            {"class": name, "precision": p, "recall": r, "f1": f, "support": s}
            for name, p, r, f, s in zip(
                classes,
                precision.tolist(),
                recall.tolist(),
                f1.tolist(),
                support.tolist(),
                strict=True,
            )
        ],
        "confusion": confusion.tolist(),
    }


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
    """Write a CSV: path, label, predicted, its probability, and top5 as JSON in a cell.

    names: the path of every row of the split; `predictions.index` picks from them. top5: up to five
    pairs `[class, probability]`, most probable first. UTF-8, where bytes of file names that are not
    UTF-8 stay as they are: `open(path, newline="", encoding="utf-8", errors="surrogateescape")` and
    the csv module give every text and number back exactly. Raises as `summarise` does, and
    SaveFailed.
    """
    probabilities, labels = _checked(predictions, len(classes))
    order = _ranked(probabilities)[:, :5]
    top = np.take_along_axis(probabilities, order, axis=1)
    text = io.StringIO(newline="")
    # Quoted texts: a lone carriage return in a name would otherwise end the row for some readers.
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    table.writerow(COLUMNS)
    for row, label, best, values in zip(
        predictions.index.tolist(), labels.tolist(), order.tolist(), top.tolist(), strict=True
    ):
        five = [[classes[number], value] for number, value in zip(best, values, strict=True)]
        table.writerow([names[row], classes[label], classes[best[0]], values[0], json.dumps(five)])
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _checked(
    predictions: Predictions, classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The probabilities `[n, C]` in float64 and the labels `[n]`, or one clear error."""
    probabilities = predictions.probabilities.double().numpy()
    labels = predictions.labels.numpy()
    if len(labels) == 0:
        raise DataError("The split has no images to evaluate; choose another split.")
    if probabilities.shape[1] != classes:
        raise ModelError(
            f"The model has {probabilities.shape[1]} classes and the data have {classes}; "
            "evaluate it on data with its own classes."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"A label lies outside the {classes} classes; check the class map of the data."
        )
    broken = int((~np.isfinite(probabilities)).any(1).sum())
    if broken:
        raise DivergedError(
            f"The probabilities of {broken} of {len(labels)} images are not finite; "
            "use an earlier checkpoint or a lower learning rate."
        )
    return probabilities, labels


def _ranked(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Class numbers `[n, C]`, most probable first; the lower number first among equals."""
    return np.argsort(-probabilities, axis=1, kind="stable")


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    cells = np.bincount(labels * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def _rates(confusion: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Precision, recall, F1 `[C]`: hits / predicted, hits / labelled, 2 hits / both; 0 / 0 = 0."""
    hits, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return tuple(
        above / np.maximum(below, 1)
        for above, below in ((hits, predicted), (hits, labelled), (2 * hits, labelled + predicted))
    )
