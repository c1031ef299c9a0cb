"""Labels that the nearest neighbours of an image contradict."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nearkin.evaluation.evaluator import CHUNK

NEIGHBOURS = 20  # that vote on the label of an image
TEMPERATURE = 0.05  # of the votes: a neighbour counts exp(cosine / 0.05)
AGREED = 0.8  # least share of the votes for another class above which a label is suspicious
OWN = 0.1  # greatest share of the votes for the own class below which it is


class Suspects(NamedTuple):
    """Of N images. own: share of the neighbours' votes for the label, in [0, 1]. other: class of the most votes among
    those that are not the label. votes: its share. ranking: all rows, the most suspicious first. suspicious: whether
    the neighbours agree on another class."""

    own: NDArray[np.float64]
    other: NDArray[np.int64]
    votes: NDArray[np.float64]
    ranking: NDArray[np.int64]
    suspicious: NDArray[np.bool_]


@torch.no_grad()
def suspects(features: Tensor, labels: NDArray[np.int64], classes: int) -> Suspects:
    """Compare each label with those of the 20 nearest other images by cosine: leave-one-out, so that no image votes for
    itself.

    features: `[N, d]` of any length. labels: `[N]`, below `classes`. An image has the votes of its
    neighbours, weighted by exp(cosine / 0.05) and made to sum to 1; none (all shares 0) where it is alone in its class,
    since nothing could speak for its label, and where there are fewer than 40 images. Ranked by the share of its own
    label minus that of the strongest other class, lowest first. Memory: 64 MiB of similarities, whatever N.
    """
    unit = F.normalize(features.float(), dim=1)
    own_class = torch.from_numpy(labels)
    step = max(1, CHUNK // max(len(labels), classes))
    enough = len(labels) >= 2 * NEIGHBOURS
    judged = (torch.bincount(own_class, minlength=classes)[own_class] > 1) & enough
    parts = []
    for rows in torch.split(torch.arange(len(labels)), step):
        shares = _votes(unit, own_class, rows, classes) * judged[rows, None]
        given = own_class[rows, None]
        parts.append((shares.gather(1, given)[:, 0], *shares.scatter_(1, given, -1.0).max(1)))
    own, votes, other = (torch.cat(column) for column in zip(*parts, strict=True))
    ranking = torch.argsort(own - votes, stable=True)
    suspicious = (own <= OWN) & (votes >= AGREED)
    return Suspects(own.numpy(), other.numpy(), votes.numpy(), ranking.numpy(), suspicious.numpy())


def _votes(unit: Tensor, labels: Tensor, rows: Tensor, classes: int) -> Tensor:
    """`[len(rows), classes]`, sums to 1 in each row, float64."""
    if len(labels) < 2:
        return torch.zeros(len(rows), classes, dtype=torch.float64)
    similarities = unit[rows] @ unit.T
    similarities[torch.arange(len(rows)), rows] = -torch.inf
    nearest = similarities.topk(min(NEIGHBOURS, len(labels) - 1), dim=1)
    weights = (nearest.values.double() / TEMPERATURE).softmax(1)
    empty = torch.zeros(len(rows), classes, dtype=torch.float64)
    return empty.scatter_add(1, labels[nearest.indices], weights)
