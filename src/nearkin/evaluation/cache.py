"""Predictions kept in the run folder, so that a model looks at a split once."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nearkin.data import Files, Split
from nearkin.errors import ModelError, printable
from nearkin.evaluation.bundle import DESCRIPTION, FORMAT, WEIGHTS
from nearkin.files import SaveFailed, write_atomic
from nearkin.network import read_safetensors

FOLDER = "cache"
NAME = "probabilities"
PACKAGES = ("nearkin", "torch", "timm", "torchvision", "pillow")  # what turns files into numbers


def cache_key(run: Path, split: Split, images: str, tta: str, device: torch.device) -> str:
    """SHA-256 of all that the probabilities depend on: model, transform, views, images, versions, device.

    images: `fingerprint` of the split.
    """
    digest = hashlib.sha256()
    for file in (WEIGHTS, DESCRIPTION):
        with (run / file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    versions = [version(package) for package in PACKAGES]
    digest.update(json.dumps([FORMAT, tta, device.type, split.name, images, versions]).encode())
    return digest.hexdigest()


def fingerprint(split: Split) -> str:
    """SHA-256 of which images a split holds, in order. Of arrays all pixels; of files the place, the size and the time
    of the last change, since two files may well have one name and one size."""
    digest = hashlib.sha256()
    images = split.images
    if isinstance(images, Files):
        digest.update(os.fsencode(os.path.realpath(images.root)))
    for row in range(len(split.labels)):
        parts = [images.identity(row)]
        if isinstance(images, Files):
            parts.append(b"%d" % _changed(images.path(row)))
        for part in parts:  # with their lengths, so that no two lists look alike
            digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - called once per image
    except OSError:
        return -1


class Found(NamedTuple):
    """Probabilities `[N, C]` float32 if they were kept; else why a file that is there was not taken, if one is."""

    probabilities: Tensor | None
    note: str | None = None


def read_cached(run: Path, key: str, shape: tuple[int, int]) -> Found:
    """What is kept under `key`. Anything but N rows of C probabilities is left aside."""
    path = run / FOLDER / f"{key}.safetensors"
    try:
        if not path.is_file():
            return Found(None)
        kept = read_safetensors(path).get(NAME)
    except (OSError, ModelError):
        kept = None
    if kept is None or kept.shape != shape or kept.dtype != torch.float32 or not _sound(kept):
        shown = printable(str(path))
        return Found(None, f"{shown} does not hold this model's predictions; it was made anew")
    return Found(kept)


def _sound(rows: Tensor) -> bool:
    total = rows.sum(1)
    return bool((rows >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)


def write_cached(run: Path, key: str, probabilities: Tensor) -> str | None:
    """Keep them, or say why that was not possible: a cache is no reason to fail."""
    from safetensors.torch import save

    folder = run / FOLDER
    if folder.is_symlink():
        return f"{printable(str(folder))} is a link, so the predictions were not kept there"
    try:
        folder.mkdir(exist_ok=True)
        data = save({NAME: probabilities.float().contiguous()})
        write_atomic(folder / f"{key}.safetensors", data)
    except OSError as error:
        return (
            f"the predictions were not kept: no folder {printable(str(folder))} ({error.strerror})"
        )
    except SaveFailed as error:
        return f"the predictions were not kept: {error}"
    return None
