"""A network against a split: exact at any size and on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nearkin.data import EvalSpec, Split, eval_loader, eval_transform
from nearkin.errors import ModelError
from nearkin.evaluation.predict import collect, knn_accuracy
from nearkin.network import Network
from nearkin.runtime import Runtime
from nearkin.types import Batch, Predictions

NEIGHBOURS = 5_000  # training images that a kNN accuracy compares with, evenly spread


class Judge:
    """Looks at splits with the evaluation transform. Each process takes every W-th image, none twice."""

    def __init__(self, runtime: Runtime, spec: EvalSpec, *, batch_size: int, workers: int) -> None:
        self._runtime, self._spec = runtime, spec
        self._batch_size, self._workers = batch_size, workers

    def predictions(self, network: Network, split: Split) -> Predictions:
        """The class probabilities of every image of `split`, in its order, on every process."""
        rows = self._mine(range(len(split.labels)))
        mine = None
        if rows:
            with self._looking(network):
                mine = collect(self._batches(split, rows), lambda images: _logits(network, images))
        parts = [part for part in self._runtime.collect(mine) if part is not None]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = columns[2].argsort()
        return Predictions(*(column[order] for column in columns))

    def knn(self, network: Network, train: Split, split: Split) -> float:
        """kNN accuracy of the embedding: how a stage without a classifier is judged."""
        spread = range(0, len(train.labels), -(-len(train.labels) // NEIGHBOURS))
        keys, key_labels = self._embeddings(network, train, spread)
        rows, labels = self._embeddings(network, split, range(len(split.labels)))
        return knn_accuracy(keys, key_labels, rows, labels)

    @torch.no_grad()
    def _embeddings(self, network: Network, split: Split, rows: range) -> tuple[Tensor, Tensor]:
        mine: list[tuple[Tensor, Tensor]] = []
        with self._looking(network):
            for batch in self._batches(split, self._mine(rows)):
                outputs = network(batch.images.flatten(0, 1))
                mine.append((outputs.embedding.float().cpu(), batch.labels.cpu()))
        everyone = [part for parts in self._runtime.collect(mine) for part in parts]
        return torch.cat([e for e, _ in everyone]), torch.cat([y for _, y in everyone])

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

    def _batches(self, split: Split, rows: range) -> Iterator[Batch]:
        transform = eval_transform(self._spec)
        loader = eval_loader(
            split, transform, rows, batch_size=self._batch_size, workers=self._workers
        )
        device = self._runtime.device
        for batch in loader:
            yield Batch(batch.images.to(device), batch.labels.to(device), batch.index.to(device))


def _logits(network: Network, images: Tensor) -> Tensor:
    logits = network(images.flatten(0, 1)).logits
    if logits is None:
        raise ModelError("This model has no classifier, so it has no classes to predict.")
    return torch.as_tensor(logits)
