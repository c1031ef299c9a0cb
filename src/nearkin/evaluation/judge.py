"""A network against a split: exact at any size and on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nearkin.data import EvalSpec, Split, eval_loader
from nearkin.errors import ModelError
from nearkin.evaluation.predict import collect, knn_accuracy
from nearkin.evaluation.tta import COUNTS, Tta, tta_views
from nearkin.network import Network
from nearkin.runtime import Runtime
from nearkin.types import Batch, Predictions

NEIGHBOURS = 5_000  # training images that a kNN accuracy compares with, evenly spread


class Judge:
    """Looks at splits with the evaluation transform. Each process takes every W-th image, none twice."""

    def __init__(self, runtime: Runtime, spec: EvalSpec, *, batch_size: int, workers: int) -> None:
        self._runtime, self._spec = runtime, spec
        self._batch_size, self._workers = batch_size, workers

    def predictions(self, network: Network, split: Split, tta: Tta = "none") -> Predictions:
        """The class probabilities of every image of `split`, in its order, on every process."""
        return self.look(network, split, tta)[0]

    def look(self, network: Network, split: Split, tta: Tta = "none") -> tuple[Predictions, Tensor]:
        """The predictions and the embeddings `[N, e]` of the first view, from one pass, on every process."""
        rows = self._mine(range(len(split.labels)))
        kept: list[Tensor] = []

        def forward(images: Tensor) -> Tensor:
            outputs = network(images.flatten(0, 1))
            if outputs.logits is None:
                raise ModelError("This model has no classifier, so it has no classes to predict.")
            kept.append(outputs.embedding[: images.shape[1]].float())
            logits: Tensor = outputs.logits
            return logits

        mine = None
        if rows:
            with self._looking(network):
                found = collect(self._batches(split, rows, tta), forward)
            mine = (*found, torch.cat(kept).cpu())  # both ascend by row
        parts = [part for part in self._runtime.collect(mine) if part is not None]
        whole = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = whole[2].argsort()
        probabilities, labels, index, embeddings = (column[order] for column in whole)
        return Predictions(probabilities, labels, index), embeddings

    def embeddings(self, network: Network, split: Split, most: int | None = None) -> Tensor:
        """The embeddings of `split` in its order, or of at most `most` evenly spread images, on every process."""
        spread = self.spread(split, most)
        with torch.no_grad(), self._looking(network):
            mine = [
                network(batch.images.flatten(0, 1)).embedding.float().cpu()
                for batch in self._batches(split, self._mine(spread))
            ]
        whole = torch.cat([part for parts in self._runtime.collect(mine) for part in parts])
        world = self._runtime.world_size
        rows = torch.cat([torch.tensor(list(spread[rank::world])) for rank in range(world)])
        return whole[rows.argsort()]

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
