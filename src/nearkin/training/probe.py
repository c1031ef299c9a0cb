"""The linear probe with which a run from pretrained weights begins: logistic regression on frozen features.

Its weights become the classifier's first weights (linear probing, then fine-tuning: Kumar et al. 2022, arXiv
2202.10054), and its accuracy is the first validation. `--refit` fits another one to the features at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn needs it
from torch import Tensor, nn

from nearkin.data.dataset import Dataset, Split, limited
from nearkin.distributed import Runtime
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.frozen import frozen_features
from nearkin.evaluation.model import Built
from nearkin.network import CosineClassifier, Head, Network

Labels = NDArray[np.int64]
Rows = NDArray[np.float32]
Fold = tuple[Rows, Labels, Rows, Labels]  # to fit, then held out

STRENGTHS = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse of the penalty
USUAL = 3e-2  # where nothing can be held out
FEW = 5  # validation images per class, below which the training images are cross-validated as well
FOLDS = 3
MOST_TO_CHOOSE = 2_000  # for the strength by cross-validation
ITERATIONS = 300
LARGE = 4_000_000  # rows x classes; above it fewer iterations, so that a fit does not take hours


class Probe(NamedTuple):
    """logits = features @ weight.T + bias. weight: `[C, d]`. bias: `[C]`. strength: scikit-learn's C. top1: of the
    classifier that was given these weights, on the validation images; None without any."""

    weight: Tensor
    bias: Tensor
    strength: float
    top1: float | None = None


def readable(heads: dict[str, Head]) -> str | None:
    """The name of the classifier that a probe can give its weights: the one that reads the features; None where
    another head is between."""
    for name, head in heads.items():
        if head.writes == "logits" and head.reads == "features":
            return name if isinstance(head.module, nn.Linear | CosineClassifier) else None
    return None


def start_from_probe(
    built: Built,
    dataset: Dataset,
    evaluator: Evaluator,
    runtime: Runtime,
    *,
    most: int,
) -> Probe:
    """Fit a probe on at most `most` training images, as many of each class, and give its weights to the classifier.

    The features are of the evaluation transform and its mirror image; they are kept for the next run. Raises ValueError
    for an objective without a classifier that reads the features.
    """

    def features(split: Split) -> Tensor:
        return frozen_features(evaluator, runtime, built.network, split, built.spec)

    return _give(built.network, built.objective.heads, dataset, features, runtime, most)


def refit(
    network: Network,
    heads: dict[str, Head],
    dataset: Dataset,
    evaluator: Evaluator,
    runtime: Runtime,
    *,
    most: int,
) -> Probe:
    """The same with the features that the trained network gives now. heads: of the objective. Raises as above."""

    def features(split: Split) -> Tensor:
        return evaluator.features(network, split)

    return _give(network, heads, dataset, features, runtime, most)


def _give(
    network: Network,
    heads: dict[str, Head],
    dataset: Dataset,
    features: Callable[[Split], Tensor],
    runtime: Runtime,
    most: int,
) -> Probe:
    """Fit a probe, and give the classifier its weights; one of cosines takes their directions only."""
    name = readable(heads)
    if name is None:
        raise ValueError("The objective has no classifier that reads the features.")
    train, validation = dataset.splits["train"], dataset.splits.get("val")
    if len(train.labels) > most:
        train = train.take(limited(train.labels, max(1, most // len(dataset.classes)), seed=0))
    given = features(train).numpy(), train.labels
    held_out = None if validation is None else (features(validation).numpy(), validation.labels)
    classes = len(dataset.classes)
    probe = runtime.share(fit(*given, held_out, classes) if runtime.is_main else None)
    assert probe is not None
    classifier = network.heads[name]
    assert isinstance(classifier, nn.Linear | CosineClassifier)
    with torch.no_grad():
        classifier.weight.copy_(probe.weight)
        if isinstance(classifier, nn.Linear):
            classifier.bias.copy_(probe.bias)
        if held_out is None:
            return probe
        rows, right = map(torch.from_numpy, (held_out[0][:, 0], held_out[1]))
        logits = classifier(rows.to(classifier.weight))
    return probe._replace(top1=float((logits.argmax(1).cpu() == right).float().mean()))


def fit(
    features: Rows, labels: Labels, validation: tuple[Rows, Labels] | None, classes: int
) -> Probe:
    """Multinomial logistic regression by scikit-learn, of the strength with the most hits on held-out images; of equals
    that with the lowest log loss.

    features: `[N, V, d]`, V views of each image. labels: `[N]`, from 0 to `classes` - 1; two occur.
    validation: the same of held-out images, whose first view counts. Where it is missing or has fewer than FEW images a
    class, training images are held out in turn as well.
    """
    folds: list[Fold] = []
    if validation is not None:
        folds.append((features, labels, validation[0][:, 0], validation[1]))
    if validation is None or len(validation[1]) < FEW * classes:
        folds += _folds(features, labels)
    # NumPy's and SciPy's threads are not torch's. The limit applies to libraries that are loaded already.
    import_module("sklearn.linear_model")
    with threadpool_limits(torch.get_num_threads()):
        best = max(STRENGTHS, key=lambda s: _score(classes, s, folds)) if folds else USUAL
        return _fitted(features, labels, classes, best)


def _folds(features: Rows, labels: Labels) -> Iterator[Fold]:
    """Cross-validation over at most MOST_TO_CHOOSE images, or FOLDS of each class; nothing where every class has a
    single image."""
    from sklearn.model_selection import StratifiedKFold

    classes = int(labels.max()) + 1
    chosen = limited(labels, max(FOLDS, MOST_TO_CHOOSE // classes), seed=0)
    features, labels = features[chosen], labels[chosen]
    folds = min(FOLDS, int(np.bincount(labels).max()))
    if folds < 2:
        return
    splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings(action="ignore"):  # about classes with fewer images than folds
        parts = list(splitter.split(labels, labels))
    for kept, held in parts:
        # Of two classes the only image of one may be held out, and nothing can be learned.
        if len(np.unique(labels[kept])) > 1:
            yield features[kept], labels[kept], features[held][:, 0], labels[held]


def _fitted(features: Rows, labels: Labels, classes: int, strength: float) -> Probe:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    views = features.shape[1]
    rows, own = features.reshape(-1, features.shape[-1]), np.repeat(labels, views)
    most = max(ITERATIONS // 10, int(ITERATIONS * min(1.0, LARGE / (len(rows) * classes))))
    model = LogisticRegression(C=strength, max_iter=most, tol=1e-3)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        model.fit(rows, own)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row, for the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    # A class without an image in a fold is as improbable as the most improbable one.
    all_weights = torch.zeros(classes, rows.shape[1])
    biases = torch.full((classes,), float(bias.min()))
    all_weights[model.classes_] = torch.from_numpy(weight).float()
    biases[model.classes_] = torch.from_numpy(bias).float()
    return Probe(all_weights, biases, strength)


def _score(classes: int, strength: float, folds: list[Fold]) -> tuple[int, float]:
    """Hits on the held-out images, and minus the sum of their log losses."""
    hits, losses = 0, 0.0
    for features, labels, held_out, own in folds:
        probe = _fitted(features, labels, classes, strength)
        logits = torch.from_numpy(held_out) @ probe.weight.T + probe.bias
        right = torch.from_numpy(own)
        hits += int((logits.argmax(1) == right).sum())
        losses += float(nn.functional.cross_entropy(logits, right, reduction="sum"))
    return hits, -losses
