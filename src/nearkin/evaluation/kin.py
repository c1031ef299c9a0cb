"""The kin of an image: the training images that are nearest to it in the embedding of a model.

A finished run keeps its training images as rows of unit length in kin.safetensors, with what validation says about
distances and probabilities. `predict` and the report name the evidence for a prediction from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.data.dataset import Dataset, Split, limited
from nearkin.distributed import Runtime
from nearkin.errors import ModelError, printable
from nearkin.evaluation.calibration import fit_temperature, scaled
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.model import check_digest, read_description
from nearkin.evaluation.options import DESCRIPTION
from nearkin.evaluation.options import EVIDENCE as FILE
from nearkin.files import write_atomic
from nearkin.network import Network, read_safetensors
from nearkin.objectives import Objective

MOST_KEYS = 20_000  # training images kept; of more, equally many of each class
MOST_VALUES = (
    1 << 26
)  # probabilities of validation images held at once: 256 MiB; of more images, evenly spread ones
CHUNK = 1 << 24  # similarities held at once: 64 MiB
CLOSEST = 5  # images to which the distance of an image is measured


class Kin(NamedTuple):
    """The training images of a model, and what is usual for images that it has not seen.

    embeddings: `[N, e]` float32 rows of unit length. labels: `[N]` class numbers. names: of the images, as in
    `predictions.csv`. temperature, neighbours: of the attention (see `nearest`). typical: `[V]` rising, the distances
    (see `distance`) of the validation images, in [0, 2]. scores: `[V]` rising, 1 - p(label) of the validation images
    with the probabilities scaled by the model's temperature. V is 0 without a validation split.
    """

    embeddings: Tensor
    labels: Tensor
    names: tuple[str, ...]
    temperature: float
    neighbours: int
    typical: Tensor
    scores: Tensor


class Nearest(NamedTuple):
    """The k nearest training images of M images, nearest first; all `[M, k]`.

    index: rows of `Kin`. similarity: cosines. weight: softmax of similarity / temperature over the k; each row sums
    to 1. For CoNe this is the attention of its neighbour loss, with keys from the final network.
    """

    index: Tensor  # type: ignore[assignment]  # the field shadows tuple.index, which nobody needs here
    similarity: Tensor
    weight: Tensor


def nearest(kin: Kin, embeddings: Tensor, *, most: int | None = None) -> Nearest:
    """The nearest training images of `embeddings` `[M, e]` (of any length). most: k; by default that of the model.

    Memory: 64 MiB of similarities at a time, and three numbers for each image and neighbour.
    """
    k = min(most or kin.neighbours, len(kin.labels))
    chunks = torch.split(embeddings, max(1, CHUNK // max(1, len(kin.labels))))
    found = [
        (F.normalize(rows.float(), dim=1) @ kin.embeddings.T).topk(k, dim=1) for rows in chunks
    ]
    similarity = torch.cat([each.values for each in found]).clamp(-1, 1)  # the keys are rounded
    weight = (similarity / kin.temperature).softmax(1)
    return Nearest(torch.cat([each.indices for each in found]), similarity, weight)


def distance(found: Nearest) -> Tensor:
    """`[M]`: 1 - the mean cosine of the CLOSEST nearest training images, in [0, 2]."""
    return 1 - found.similarity[:, :CLOSEST].mean(1)


def unlike(kin: Kin, distances: Tensor) -> Tensor | None:
    """`[M]` in [0, 1]: the share of validation images that are nearer to their kin; None without validation images."""
    if len(kin.typical) == 0:
        return None
    return torch.searchsorted(kin.typical, distances.contiguous()).float() / len(kin.typical)


def collect(
    network: Network,
    objective: Objective,
    dataset: Dataset,
    evaluator: Evaluator,
    runtime: Runtime,
) -> tuple[Kin, float | None]:
    """The kin of a trained network, on every process, and the temperature that validation gives its probabilities.

    The temperature is None without a validation split or a classifier.
    """
    train, validation = dataset.splits["train"], dataset.splits.get("val")
    rows = np.arange(len(train.labels))
    if len(rows) > MOST_KEYS:
        rows = limited(train.labels, max(1, MOST_KEYS // len(dataset.classes)), seed=0)
    keys = F.normalize(evaluator.embeddings(network, train, rows.tolist()).float(), dim=1)
    attention = objective.attention()
    kin = Kin(
        # Rounded as in the file, so that distances before and after are the same.
        keys.half().float(),
        torch.from_numpy(train.labels[rows]),
        tuple(train.images.name(int(row)) for row in rows),
        attention.temperature,
        attention.neighbours,
        torch.empty(0),
        torch.empty(0),
    )
    if validation is None or not network.classifies:
        return kin, None
    return _with_validation(kin, network, validation, evaluator, runtime)


def _with_validation(
    kin: Kin, network: Network, split: Split, evaluator: Evaluator, runtime: Runtime
) -> tuple[Kin, float]:
    count = min(len(split.labels), max(1, MOST_VALUES // len(split.classes)))
    rows = np.linspace(0, len(split.labels) - 1, count).round().astype(np.int64).tolist()
    embeddings, probabilities = evaluator.embeddings_and_probabilities(network, split, rows)
    labels = torch.from_numpy(split.labels[rows])
    # One process computes: rounding must not give the processes different temperatures.
    temperature = runtime.share(fit_temperature(probabilities, labels) if runtime.is_main else None)
    assert temperature is not None
    own = scaled(probabilities, temperature).gather(1, labels[:, None])[:, 0]
    typical = distance(nearest(kin, embeddings, most=CLOSEST))
    return kin._replace(typical=typical.sort().values, scores=(1 - own).sort().values), temperature


def write_kin(folder: Path, kin: Kin) -> None:
    """Write kin.safetensors, whole or not at all; the embeddings in float16. Raises SaveFailed."""
    from safetensors.torch import save

    names = json.dumps(kin.names).encode()
    tensors = {
        "embeddings": kin.embeddings.half().contiguous(),
        "labels": kin.labels.contiguous(),
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        "attention": torch.tensor([kin.temperature, kin.neighbours], dtype=torch.float64),
        "typical": kin.typical.contiguous(),
        "scores": kin.scores.contiguous(),
    }
    write_atomic(folder / FILE, save(tensors))


def read_kin(folder: Path, classes: int) -> Kin:
    """The kin of a run folder. Raises ModelError when the file is missing, damaged, or not of `classes` classes."""
    path = folder / FILE
    if not path.is_file():
        raise ModelError(
            f"{printable(str(path))} is missing, so nothing is known of the training images; train the run anew."
        )
    if (folder / DESCRIPTION).is_file():
        check_digest(folder, read_description(folder), FILE)
    tensors = read_safetensors(path)
    try:
        names = tuple(json.loads(tensors["names"].numpy().tobytes()))
        temperature, neighbours = tensors["attention"].tolist()
        kin = Kin(
            tensors["embeddings"].float(),
            tensors["labels"],
            names,
            float(temperature),
            int(neighbours),
            tensors["typical"].float(),
            tensors["scores"].float(),
        )
        sound = _is_sound(kin, classes)
    except (LookupError, ValueError, TypeError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise ModelError(
            f"{printable(str(path))} is damaged; train the run anew, or delete the file to go on without "
            "evidence."
        )
    return kin


def _is_sound(kin: Kin, classes: int) -> bool:
    count = len(kin.names)
    return (
        count > 0
        and kin.embeddings.dim() == 2
        and len(kin.embeddings) == count
        and kin.labels.shape == (count,)
        and kin.labels.dtype == torch.int64
        and 0 <= int(kin.labels.min()) <= int(kin.labels.max()) < classes
        and all(isinstance(name, str) for name in kin.names)
        and kin.temperature > 0
        and kin.neighbours > 0
        and kin.typical.dim() == kin.scores.dim() == 1
        and all(bool(t.isfinite().all()) for t in (kin.embeddings, kin.typical, kin.scores))
    )
