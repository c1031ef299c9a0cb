"""Predictions, embeddings and kNN accuracy of a network on a split, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.data.dataset import Split
from nearkin.data.loader import eval_loader
from nearkin.data.transforms import EvalSpec
from nearkin.distributed import Runtime
from nearkin.errors import DataError, DivergedError, ModelError
from nearkin.evaluation.tta import COUNTS, Tta, tta_views
from nearkin.network import Network
from nearkin.types import Batch, Outputs, Predictions

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


NEIGHBOURS = 5_000  # training images that a kNN accuracy compares with, evenly spread


class Evaluator:
    """Looks at splits with the evaluation transform. Each process takes every W-th image, none twice."""

    def __init__(self, runtime: Runtime, spec: EvalSpec, *, batch_size: int, workers: int) -> None:
        self._runtime, self._spec = runtime, spec
        self._batch_size, self._workers = batch_size, workers

    def predictions(self, network: Network, split: Split, tta: Tta = "none") -> Predictions:
        """The class probabilities of every image of `split`, in its order, on every process."""
        return self._predict(network, split, tta, lambda _: None)

    def look(self, network: Network, split: Split) -> tuple[Predictions, Tensor]:
        """The predictions and the embeddings `[N, e]`, from one pass, in the order of `split`, on every process."""
        mine: list[Tensor] = []
        predictions = self._predict(
            network, split, "none", lambda outputs: mine.append(outputs.embedding.float())
        )
        return predictions, self._gathered(mine, range(len(split.labels)))

    def _predict(
        self, network: Network, split: Split, tta: Tta, watch: Callable[[Outputs], None]
    ) -> Predictions:
        """The predictions; `watch` sees what the network says of each batch of this process."""

        def forward(images: Tensor) -> Tensor:
            outputs = network(images.flatten(0, 1))
            if outputs.logits is None:
                raise ModelError("This model has no classifier, so it has no classes to predict.")
            watch(outputs)
            logits: Tensor = outputs.logits
            return logits

        rows = self._mine(range(len(split.labels)))
        mine = None
        if rows:
            with self._looking(network):
                mine = collect(self._batches(split, rows, tta), forward)
        parts = [part for part in self._runtime.collect(mine) if part is not None]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = columns[2].argsort()
        return Predictions(*(column[order] for column in columns))

    def embeddings(self, network: Network, split: Split, most: int | None = None) -> Tensor:
        """The embeddings of `split` in its order, or of at most `most` evenly spread images, on every process."""
        spread = self.spread(split, most)
        with torch.no_grad(), self._looking(network):
            mine = [
                network(batch.images.flatten(0, 1)).embedding.float()
                for batch in self._batches(split, self._mine(spread))
            ]
        return self._gathered(mine, spread)

    def _gathered(self, mine: list[Tensor], rows: range) -> Tensor:
        """What the processes have of `rows`, each of its own share, in the order of `rows`."""
        parts = self._runtime.collect(torch.cat(mine).cpu() if mine else None)
        whole = torch.cat([part for part in parts if part is not None])
        world = self._runtime.world_size
        places = torch.arange(len(rows))
        return whole[torch.cat([places[rank::world] for rank in range(world)]).argsort()]

    def spread(self, split: Split, most: int | None) -> range:
        """The rows that `embeddings` takes."""
        count = len(split.labels)
        return range(0, count, 1 if most is None else max(1, -(-count // most)))

    def knn(self, network: Network, train: Split, split: Split) -> tuple[float, Tensor]:
        """kNN accuracy of the embedding, how a stage without a classifier is judged; and the embeddings of `split`."""
        keys, rows = self.embeddings(network, train, NEIGHBOURS), self.embeddings(network, split)
        key_labels = torch.from_numpy(train.labels[list(self.spread(train, NEIGHBOURS))])
        return knn_accuracy(keys, key_labels, rows, torch.from_numpy(split.labels)), rows

    def _mine(self, rows: range) -> range:
        return rows[self._runtime.rank :: self._runtime.world_size]

    @contextmanager
    def _looking(self, network: Network) -> Iterator[None]:
        """Eval mode and the precision of the run; afterwards the network is as it was."""
        was = network.training
        network.eval()
        try:
            with self._runtime.autocast():
                yield
        finally:
            network.train(was)

    def _batches(self, split: Split, rows: range, tta: Tta = "none") -> Iterator[Batch]:
        views = tta_views(tta, self._spec)
        size = max(1, self._batch_size // COUNTS[tta])
        device = self._runtime.device
        for batch in eval_loader(split, views, rows, batch_size=size, workers=self._workers):
            yield Batch(batch.images.to(device), batch.labels.to(device), batch.index.to(device))
