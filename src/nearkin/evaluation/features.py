"""The features of a split, computed once: plain ones, and those of augmented copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from nearkin.data import (
    SampleKey,
    Split,
    TrainSpec,
    eval_loader,
    train_loader,
    train_transform,
)
from nearkin.errors import ModelError
from nearkin.evaluation.bundle import Bundle
from nearkin.evaluation.tta import tta_views
from nearkin.types import Batch

BATCH = 64  # images that pass through the network at once


class Features(NamedTuple):
    """Rows of unit length in float32. plain: `[N, d]`, evaluation transform. copies: `[N, copies, d]`, augmented."""

    plain: NDArray[np.float32]
    copies: NDArray[np.float32]


def extract(
    bundle: Bundle,
    split: Split,
    rows: Sequence[int],
    *,
    copies: int,
    flip: bool,
    seed: int,
    workers: int,
) -> Features:
    """The pooled features of the backbone, |f| = 1, without any head, for N `rows` of `split`, in their order.

    Copy k of row i is drawn by the augmentation `light` (mirrored only if `flip`) from (seed, i, k), as training
    draws its views, so that neither the workers, nor the other rows, nor the number of copies change it.
    copies 0: the plain features stand in as the only copy. Memory: 4 N (copies + 1) d bytes.

    Raises ModelError when a feature is not finite, DataError when an image can no longer be read.
    """
    spec = bundle.description.transform
    plain = eval_loader(split, tta_views("none", spec), rows, batch_size=BATCH, workers=workers)
    found = _features(bundle, plain)
    if copies == 0:
        return Features(found[:, 0], found)
    light = TrainSpec.of("light", image_size=spec.image_size, channels=spec.channels, flip=flip)
    at_once = max(1, BATCH // copies)
    order = [
        [SampleKey(row, epoch=0, occurrence=0) for row in rows[start : start + at_once]]
        for start in range(0, len(rows), at_once)
    ]
    transform = train_transform(light)
    loader = train_loader(split, transform, order, views=copies, seed=seed, workers=workers)
    return Features(found[:, 0], _features(bundle, loader))


@torch.inference_mode()
def _features(bundle: Bundle, batches: Iterable[Batch]) -> NDArray[np.float32]:
    """`[N, V, d]` of batches of V views."""
    device = next(bundle.network.parameters()).device
    parts = []
    for batch in batches:
        pooled = bundle.network(batch.images.flatten(0, 1).to(device)).features.float()
        if not pooled.isfinite().all():
            raise ModelError("The model gives features that are not finite; train it anew.")
        views, images = batch.images.shape[:2]
        unit = F.normalize(pooled, dim=1).view(views, images, -1)
        parts.append(unit.transpose(0, 1).cpu())
    found: NDArray[np.float32] = torch.cat(parts).numpy()
    return found
