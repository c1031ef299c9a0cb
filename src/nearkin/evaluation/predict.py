"""What a model says of a split: every image once, in order, nothing padded and nothing dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.errors import DataError, DivergedError
from nearkin.types import Batch, Predictions

CHUNK = 2**24  # similarities held at once: 64 MiB in float32


@torch.no_grad()
def collect(batches: Iterable[Batch], forward: Callable[[Tensor], Tensor]) -> Predictions:
    """The class probabilities of all `batches`, sorted by index.

    forward: `batch.images` `[V, B, ...]` -> logits `[V * B, C]`, view after view. The views'
    probabilities are averaged, p = mean_v softmax(z_v), in float32 (float64 stays float64). The
    values stay where they are computed until all are, then come to the CPU once.

    Raises DataError when there is no batch or an image comes twice.
    """
    parts = [
        Predictions(
            mean_probabilities(forward(batch.images), len(batch.index)), batch.labels, batch.index
        )
        for batch in batches
    ]
    if not parts:
        raise DataError("There are no images to predict; choose another split or folder.")
    probabilities, labels, index = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    index, order = index.sort()
    if (index.diff() == 0).any():
        raise DataError("An image was predicted twice; a split must hold every image once.")
    return Predictions(probabilities[order], labels[order], index)


def mean_probabilities(logits: Tensor, images: int) -> Tensor:
    """The mean of softmax over the views, `[images, C]`, of `logits` `[V * images, C]`, view after view; in float32
    (float64 stays)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.softmax(1).view(-1, images, logits.shape[1]).mean(0)


@torch.no_grad()
def knn_accuracy(
    train_embeddings: Tensor,
    train_labels: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    k: int = 20,
) -> float:
    """Share of `embeddings` whose k nearest training embeddings vote for their class, in [0, 1].

    train_embeddings `[N, d]`, embeddings `[M, d]`: of any length, compared by cosine; labels: `[N]`
    and `[M]` class numbers. Each of the min(k, N) neighbours has one vote; of classes with equally
    many votes the one with the larger sum of cosines wins. Memory: 64 MiB of similarities, whatever
    N and M. Source: our choice.

    Raises DataError when either side is empty, DivergedError when an embedding is not finite.
    """
    if len(train_labels) == 0 or len(labels) == 0:
        raise DataError("The kNN accuracy needs images to compare with and images to judge.")
    if not (train_embeddings.isfinite().all() and embeddings.isfinite().all()):
        raise DivergedError("An embedding is not finite; lower the learning rate.")
    keys = F.normalize(train_embeddings.float(), dim=1)
    classes = int(train_labels.max()) + 1
    chunks = torch.split(embeddings, max(1, CHUNK // len(keys)))
    predicted = [
        _vote(F.normalize(chunk.float(), dim=1) @ keys.T, train_labels, min(k, len(keys)), classes)
        for chunk in chunks
    ]
    return (torch.cat(predicted) == labels).double().mean().item()


def _vote(similarities: Tensor, train_labels: Tensor, k: int, classes: int) -> Tensor:
    """The class `[B]` that the k largest of each row of `similarities` `[B, N]` vote for."""
    nearest = similarities.topk(k, dim=1)
    voters = train_labels[nearest.indices]
    empty = similarities.new_zeros(len(similarities), classes)
    votes = empty.scatter_add(1, voters, torch.ones_like(nearest.values))
    weight = empty.scatter_add(1, voters, nearest.values)
    leading = votes == votes.max(1, keepdim=True).values
    return weight.masked_fill(~leading, -torch.inf).argmax(1)
