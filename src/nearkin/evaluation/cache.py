"""Predictions kept in the run folder, so that a model looks at a split once."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from nearkin.data import Split
from nearkin.errors import ModelError, NearkinError
from nearkin.evaluation.bundle import DESCRIPTION, WEIGHTS
from nearkin.files import write_atomic
from nearkin.network import read_safetensors

FOLDER = "cache"
NAME = "probabilities"


def cache_key(run: Path, split: Split, tta: str, device: torch.device) -> str:
    """SHA-256 of all that the probabilities depend on: model, transform, views, images, versions, device."""
    digest = hashlib.sha256()
    for file in (WEIGHTS, DESCRIPTION):
        digest.update(hashlib.sha256((run / file).read_bytes()).digest())
    plain = [tta, device.type, version("nearkin"), version("torch"), split.name]
    digest.update(json.dumps(plain).encode())
    for row in range(len(split.labels)):
        identity = split.images.identity(row)
        digest.update(b"%d:" % len(identity) + identity)
    return digest.hexdigest()


def read_cached(run: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """The probabilities `[N, C]` float32 under `key`; None when there are none, or what is there is not that."""
    path = run / FOLDER / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        found = read_safetensors(path).get(NAME)
    except ModelError:
        return None
    if found is None or found.shape != shape or found.dtype != torch.float32:
        return None
    rows = found.sum(1)
    sound = bool(torch.isfinite(found).all()) and torch.allclose(
        rows, torch.ones_like(rows), atol=1e-3
    )
    return found if sound else None


def write_cached(run: Path, key: str, probabilities: Tensor) -> str | None:
    """Keep them, or say why that was not possible: a cache is no reason to fail."""
    from safetensors.torch import save

    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        data = save({NAME: probabilities.float().contiguous()})
        write_atomic(folder / f"{key}.safetensors", data)
    except (OSError, NearkinError) as error:
        return f"the predictions were not kept for the next time ({error})"
    return None
