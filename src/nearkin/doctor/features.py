"""Features of all images, of a run's network, a pretrained one, or of tiny images their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin.data.dataset import choose
from nearkin.data.sources.listing import Listing
from nearkin.data.transforms import EvalSpec
from nearkin.device import choose_device
from nearkin.distributed import Runtime
from nearkin.doctor.inventory import Inventory, Rows
from nearkin.doctor.scan import Scan
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.frozen import frozen_features
from nearkin.evaluation.model import ModelSpec, build, load_bundle
from nearkin.network import Network
from nearkin.training.console import say
from nearkin.training.defaults import EVAL_CROP, PHOTO_MODEL, photo_sides

PIXELS = 32  # of the usual short side, below which the pixels themselves are compared
PIXEL_SIDE = 16
BATCH = 64


class Described(NamedTuple):
    """features: `[n, d]`, rows of unit length. source: what gave them, for a person."""

    features: Tensor
    source: str


def describe(
    inventory: Inventory,
    listing: Listing,
    scan: Scan,
    *,
    run: Path | None,
    device: str,
    quiet: bool,
) -> Described:
    """The features of the images that can be read, in order; those of a network are kept in the cache folder.

    run: whose network is used; without one, the packaged pretrained one, or the pixels where the usual short side is
    below 32. Raises ModelError for a run without a finished model.
    """
    rows = np.flatnonzero(scan.readable)
    usual = int(np.median(np.minimum(scan.height, scan.width)[rows]))
    if run is None and usual < PIXELS:
        return Described(pixel_features(inventory, rows), "pixels")
    with Runtime(device=choose_device(device), precision="fp32") as runtime:
        if run is None:
            network, model, spec = _pretrained(runtime.device.type)
            source = PHOTO_MODEL
        else:
            bundle = load_bundle(run, runtime.device)
            network, model = bundle.network, bundle.description.spec
            spec, source = bundle.description.transform, str(run)
        runtime.place(network)
        say(f"features of {len(rows)} images by {source} ...", quiet)
        evaluator = Evaluator(runtime, spec, batch_size=BATCH, workers="auto")
        chosen = choose(
            listing, channels=spec.channels, val_split=0.0, seed=0, images_per_class=None
        )
        again = Inventory.of(chosen)
        parts = []
        for number, split in enumerate(again.splits.values()):
            some = rows[inventory.split[rows] == number] - again.starts[number]
            if len(some):
                part = split if len(some) == len(split.labels) else split.take(some)
                parts.append(frozen_features(evaluator, runtime, network, part, model))
    views = F.normalize(torch.cat(parts).float(), dim=2)
    return Described(F.normalize(views.mean(1), dim=1), source)


def _pretrained(device: str) -> tuple[Network, ModelSpec, EvalSpec]:
    """As training on such a device reads photos, so that it finds these features."""
    side, eval_side = photo_sides(device)
    spec = ModelSpec(
        model=PHOTO_MODEL,
        channels=3,
        image_size=side,
        stem="auto",
        objective="ce",
        options={},
        classes=("0", "1"),
    )
    built = build(spec, load_pretrained=True, pretrained=True)
    return built.network, built.spec, EvalSpec.for_size(eval_side, 3, EVAL_CROP)


def pixel_features(inventory: Inventory, rows: Rows) -> Tensor:
    """Each image at 16 x 16 pixels, minus its mean, `[n, 256 C]`, of unit length. Raises BadImage."""
    found = []
    for row in rows.tolist():
        part, place = inventory.place(row)
        image = part.images.read(place).float()[None]
        found.append(F.adaptive_avg_pool2d(image, PIXEL_SIDE).flatten())
    pixels = torch.stack(found)
    return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)
