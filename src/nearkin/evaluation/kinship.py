"""The kin of images with their weights, and how kin vote, with and without the nearest ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.evaluation.kin import Kin, nearest

SHOWN = 10  # kin of an image, and those that a vote is counted without
VOTES = 3  # strongest classes of each vote
LEAST = 0.005  # share of a class that is named
CHUNK = 1 << 22  # votes counted at once: 16 MiB


class Vote(NamedTuple):
    """A class and the share of the weight that kin give it, of all kin, and without the ten nearest."""

    label: int
    share: float
    without: float


class Kinship(NamedTuple):
    """The kin of R images. index: `[R, 10]` rows of `Kin`, nearest first, -1 where there are fewer. weight: `[R, 10]`
    their shares among all kin that count. votes: for each image the strongest classes, first those of all kin."""

    index: NDArray[np.int64]  # type: ignore[assignment]  # the field shadows tuple.index
    weight: NDArray[np.float32]
    votes: tuple[tuple[Vote, ...], ...]


def kinship(kin: Kin, embeddings: Tensor, classes: int, own: Tensor | None = None) -> Kinship:
    """The kin of `embeddings` `[R, e]`, of any length, among the training images.

    A vote is sum_j w_j [y_j = c] over the k = `kin.neighbours` nearest, w = softmax(similarity / temperature): what
    `nearest` gives, for CoNe the attention of its loss. Without the ten nearest, the next k vote; the network stays as
    it is. own: `[R]` rows of `kin` that are the images themselves, which are left out.
    """
    spare = 0 if own is None else 1
    size = max(1, CHUNK // max(classes, kin.neighbours))
    parts = []
    for start in range(0, max(1, len(embeddings)), size):
        rows = slice(start, start + size)
        found = nearest(kin, embeddings[rows], most=kin.neighbours + SHOWN + spare)
        index, similarity = found.index, found.similarity
        if own is not None and len(kin.labels) > 1:
            index, similarity = _others(index, similarity, own[rows])
        parts.append(_voted(kin, index, similarity, classes))
    return Kinship(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.weight for part in parts]),
        tuple(votes for part in parts for votes in part.votes),
    )


def _others(index: Tensor, similarity: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Without the image itself, or without the last where equal images hide it."""
    itself = index == own[:, None]
    itself[:, -1] |= ~itself.any(1)
    shape = len(index), index.shape[1] - 1
    return index[~itself].view(shape), similarity[~itself].view(shape)


def _voted(kin: Kin, index: Tensor, similarity: Tensor, classes: int) -> Kinship:
    k = min(kin.neighbours, index.shape[1])
    logits = similarity / kin.temperature
    weight = logits[:, :k].softmax(1)
    with_all = _votes(kin.labels[index[:, :k]], weight, classes)
    rest = slice(SHOWN, SHOWN + k)
    without = _votes(kin.labels[index[:, rest]], logits[:, rest].softmax(1), classes)
    votes = tuple(map(_strongest, with_all, without))
    missing = SHOWN - min(SHOWN, k)
    pad = torch.nn.functional.pad
    return Kinship(
        pad(index[:, : min(SHOWN, k)], (0, missing), value=-1).numpy(),
        pad(weight[:, :SHOWN], (0, missing)).numpy(),
        votes,
    )


def _votes(labels: Tensor, weight: Tensor, classes: int) -> Tensor:
    return torch.zeros(len(labels), classes).scatter_add_(1, labels, weight)


def _strongest(share: Tensor, without: Tensor) -> tuple[Vote, ...]:
    """The strongest classes of both votes."""
    most = min(VOTES, len(share))
    places = [*share.topk(most).indices.tolist(), *without.topk(most).indices.tolist()]
    found = [Vote(c, float(share[c]), float(without[c])) for c in dict.fromkeys(places)]
    strong = tuple(vote for vote in found if max(vote.share, vote.without) >= LEAST)
    return strong or (found[0],)
