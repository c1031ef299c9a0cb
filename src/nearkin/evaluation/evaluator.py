"""Predictions, embeddings and kNN accuracy of a network on a split, exact on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.config import Auto
from nearkin.data.dataset import Split
from nearkin.data.loader import PATIENCE, eval_loader, fitting_workers
from nearkin.data.transforms import EvalSpec
from nearkin.device import without_tf32
from nearkin.distributed import Runtime
from nearkin.errors import DataError, DivergedError, ModelError, Stopped
from nearkin.evaluation.metrics import reduced
from nearkin.evaluation.options import Tta
from nearkin.evaluation.tta import COUNTS, tta_views
from nearkin.network import Network
from nearkin.process import MOST_WORKERS, cores, stop_requested
from nearkin.types import Batch, Outputs, Predictions

CHUNK = 2**24  # similarities, or votes, held at once: 64 MiB in float32
NEIGHBOURS = 5_000  # training images that a kNN accuracy compares with, evenly spread


class Probabilities(NamedTuple):
    """Class probabilities `[B, C]`, labels `[B]` and rows of the split `[B]` of a batch."""

    probabilities: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which nobody needs here


class Evaluator:
    """Runs networks on splits with the evaluation transform; process r of W takes the images r, r + W, ...

    One rule for every evaluation: float32 without autocast, whatever the precision of the training (float64 where the
    network's parameters are), on a GPU without TF32. So `train` and `evaluate` measure the same number.

    workers: processes that load images, at most one for each batch. `auto`: for image files beside a GPU, one for each
    core, at most MOST_WORKERS, as far as shared memory has room; else none.
    """

    def __init__(
        self, runtime: Runtime, spec: EvalSpec, *, batch_size: int, workers: int | Auto
    ) -> None:
        self._runtime, self.spec = runtime, spec
        self._batch_size, self._workers = batch_size, workers

    def predictions(self, network: Network, split: Split) -> Predictions:
        """The predictions for `split`, in its order, on every process.

        Memory grows with the images, not with images x classes. Raises ModelError for a network without a classifier.
        """
        batches = self.probabilities(network, split)
        return Predictions(*gathered(self._runtime, (reduced(*batch) for batch in batches)))

    def probabilities(
        self, network: Network, split: Split, tta: Tta = "none"
    ) -> Iterator[Probabilities]:
        """The class probabilities of this process's images, batch by batch, on the device."""
        for outputs, labels, index in self._outputs(network, split, self.share(split), tta):
            yield _probabilities(outputs, labels, index)

    def predictions_and_embeddings(
        self, network: Network, split: Split
    ) -> tuple[Predictions, Tensor]:
        """The predictions and the embeddings `[N, e]` from one pass, in the order of `split`, on every process."""
        rows = (
            (outputs.embedding.float(), *reduced(*_probabilities(outputs, labels, index)))
            for outputs, labels, index in self._outputs(network, split, self.share(split))
        )
        embeddings, *columns = gathered(self._runtime, rows)
        return Predictions(*columns), embeddings

    def embeddings(self, network: Network, split: Split, rows: Sequence[int]) -> Tensor:
        """The embeddings `[len(rows), e]` of `rows` (rising) of `split`, on every process."""
        mine = rows[self._runtime.rank :: self._runtime.world_size]
        batches = self._outputs(network, split, mine)
        found = ((outputs.embedding.float(), index) for outputs, _, index in batches)
        return gathered(self._runtime, found)[0]

    def embeddings_and_probabilities(
        self, network: Network, split: Split, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The embeddings `[R, e]` and class probabilities `[R, C]` of R `rows` (rising), on every process.

        Raises ModelError for a network without a classifier.
        """
        mine = rows[self._runtime.rank :: self._runtime.world_size]
        found = (
            (outputs.embedding.float(), _probabilities(outputs, labels, index)[0], index)
            for outputs, labels, index in self._outputs(network, split, mine)
        )
        embeddings, probabilities, _ = gathered(self._runtime, found)
        return embeddings, probabilities

    def features(self, network: Network, split: Split) -> Tensor:
        """The backbone's features `[N, 2, d]` of each image and of its mirror image, on every process."""
        batches = self._outputs(network, split, self.share(split), "flip")
        found = (
            (outputs.features.float().view(2, len(index), -1).transpose(0, 1), index)
            for outputs, _, index in batches
        )
        return gathered(self._runtime, found)[0]

    def knn(self, network: Network, train: Split, split: Split) -> tuple[float, Tensor]:
        """The kNN accuracy of the embeddings, which measures a stage without a classifier; and the embeddings."""
        count = len(train.labels)
        keys = range(0, count, max(1, -(-count // NEIGHBOURS)))
        key_embeddings = self.embeddings(network, train, keys)
        embeddings = self.embeddings(network, split, range(len(split.labels)))
        key_labels = torch.from_numpy(train.labels[keys])
        labels = torch.from_numpy(split.labels)
        return knn_accuracy(key_embeddings, key_labels, embeddings, labels), embeddings

    def share(self, split: Split) -> range:
        """The rows of this process."""
        return range(self._runtime.rank, len(split.labels), self._runtime.world_size)

    def batch_size(self, tta: Tta) -> int:
        """Images in a batch: fewer with several views, so that the memory stays the same."""
        return max(1, self._batch_size // COUNTS[tta])

    @torch.no_grad()
    def _outputs(
        self, network: Network, split: Split, rows: Sequence[int], tta: Tta = "none"
    ) -> Iterator[tuple[Outputs, Tensor, Tensor]]:
        """Outputs of the network in eval mode, labels and index of each batch, on the device."""
        views, size = tta_views(tta, self.spec), self.batch_size(tta)
        device, training = self._runtime.device, network.training
        workers = self._loaders(split, -(-len(rows) // size), size * COUNTS[tta])
        pinned = device.type == "cuda"  # so that the copies do not wait for the network
        network.eval()
        try:
            for loaded in eval_loader(
                split, views, rows, batch_size=size, workers=workers, pin_memory=pinned
            ):
                if self._runtime.world_size == 1 and stop_requested(PATIENCE):
                    raise Stopped("Stopped on request while evaluating; continue with --resume.")
                batch = Batch(*(each.to(device, non_blocking=pinned) for each in loaded))
                with without_tf32():
                    outputs = network(batch.images.flatten(0, 1))
                yield outputs, batch.labels, batch.index
        finally:
            network.train(training)

    def _loaders(self, split: Split, batches: int, images: int) -> int:
        """The processes that load so many batches, of so many images each."""
        if self._workers != "auto":
            return min(self._workers, batches)
        if self._runtime.device.type != "cuda" or not split.images.from_files:
            return 0
        pixels = images * self.spec.channels * self.spec.image_size**2
        return fitting_workers(min(MOST_WORKERS, cores(), batches), pixels)


def gathered(runtime: Runtime, batches: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """The columns of the batches of all processes, on the CPU, sorted by the last column, the row in the split.

    The values stay on the device until the last batch, so that no batch waits for a transfer.
    Raises DataError when there is no image.
    """
    mine = [torch.cat(column).cpu() for column in zip(*batches, strict=True)]
    parts = [part for part in runtime.collect(mine) if part]
    if not parts:
        raise DataError("There are no images to predict; choose another split or folder.")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = columns[-1].argsort()
    return [column[order] for column in columns]


def _probabilities(outputs: Outputs, labels: Tensor, index: Tensor) -> Probabilities:
    if outputs.logits is None:
        raise ModelError("This model has no classifier, so it has no classes to predict.")
    return Probabilities(mean_probabilities(outputs.logits, len(index)), labels, index)


def mean_probabilities(logits: Tensor, images: int) -> Tensor:
    """The mean of softmax over the views, `[images, C]`, of `logits` `[V * images, C]`, view after view; in float32
    (float64 stays float64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    views = wide.softmax(1).view(-1, images, logits.shape[1])
    return views[0] if len(views) == 1 else views.mean(0)


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
    many votes the one with the larger sum of cosines wins. Memory: 64 MiB of similarities and as much of votes,
    whatever N, M and the number of classes.

    Raises DataError when either side is empty, DivergedError when an embedding is not finite.
    """
    if len(train_labels) == 0 or len(labels) == 0:
        raise DataError("The kNN accuracy needs images to compare with and images to classify.")
    if not (train_embeddings.isfinite().all() and embeddings.isfinite().all()):
        raise DivergedError("An embedding is not finite; lower the learning rate.")
    keys = F.normalize(train_embeddings.float(), dim=1)
    classes = int(train_labels.max()) + 1
    chunks = torch.split(embeddings, max(1, CHUNK // max(len(keys), classes)))
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
