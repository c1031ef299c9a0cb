"""A network against a split: exact at any size and on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nearkin.data import EvalSpec, Split, eval_loader
from nearkin.errors import ModelError
from nearkin.evaluation.predict import collect, knn_accuracy
from nearkin.evaluation.tta import COUNTS, Tta, tta_views
from nearkin.network import Network
from nearkin.runtime import Runtime
from nearkin.types import Batch, Outputs, Predictions

NEIGHBOURS = 5_000  # training images that a kNN accuracy compares with, evenly spread


class Judge:
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
