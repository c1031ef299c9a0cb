"""Features of frozen networks, computed once and kept in the cache folder for the next run."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from nearkin.data.cache import Packed
from nearkin.data.dataset import Split
from nearkin.data.images import Files
from nearkin.distributed import Runtime
from nearkin.errors import DataError, ModelError
from nearkin.evaluation.ensemble import checksum, images_digest, versions
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.model import ModelSpec
from nearkin.files import SaveFailed, cache_folder, write_atomic
from nearkin.network import Network, read_safetensors

NAME, CHECK = "features", "crc32"
LARGEST = 1 << 30  # bytes; more is computed anew each time


def frozen_features(
    evaluator: Evaluator, runtime: Runtime, network: Network, split: Split, spec: ModelSpec
) -> Tensor:
    """The features `[N, 2, d]` of every image of `split` and of its mirror image, float32, on every process.

    Kept under a key of everything that they depend on but the number of threads, which changes their last bits:
    what the backbone was built from (`spec`), its weights, the evaluation transform, the images (`images_digest`), the
    kind of device, and versions. A file that is damaged or cannot be written only costs the
    computation.
    """
    backbone = {"model", "model_options", "channels", "image_size", "stem"}
    architecture = spec.model_dump_json(include=backbone)
    known = [architecture, runtime.device.type, versions(), evaluator.spec.model_dump()]
    path = _path(network, split, json.dumps(known)) if runtime.is_main else None
    found = runtime.share(None if path is None else _read(path, len(split.labels)))
    if found is None:
        found = evaluator.features(network, split)
        if path is not None and found.nbytes <= LARGEST:
            with suppress(SaveFailed, OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, save({NAME: found.contiguous(), CHECK: checksum(found)}))
    if not found.isfinite().all():
        raise ModelError("The backbone gives features that are not finite; give other weights.")
    return found


def _path(network: Network, split: Split, known: str) -> Path | None:
    try:
        folder = cache_folder()
    except DataError:
        return None
    digest = hashlib.sha256(known.encode())
    for name, tensor in network.state_dict().items():
        if name.startswith(("backbone.", "mean", "std")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(split.images, Packed):
        digest.update(split.images.pack.sizes.tobytes())  # these pixels are shrunk
    if isinstance(split.images, Files):
        digest.update(b"%d" % split.images.least)  # these may be decoded at a part of their size
    digest.update(images_digest(split).encode())
    return folder / f"features-{digest.hexdigest()[:16]}.safetensors"


def _read(path: Path, images: int) -> Tensor | None:
    try:
        tensors = read_safetensors(path)
        found, check = tensors[NAME], tensors[CHECK]
    except (ModelError, LookupError):
        return None
    fits = found.dim() == 3 and len(found) == images and torch.equal(check, checksum(found))
    return found if fits else None
