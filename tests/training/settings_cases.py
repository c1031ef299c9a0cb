"""Settings without data or networks, for tests."""

from __future__ import annotations

import timm
import torch

from nearkin.config import RunConfig
from nearkin.network import default_memory_format, prefers_adamw
from nearkin.training.defaults import DataFacts, NetworkFacts, resolve, resolve_data


def data_settings(images=500, side=96, channels=3, room=0, *, files=False, device="cpu", **options):
    """files: whether the images are files, so that large ones are photos."""
    facts = DataFacts(images, side, channels, room, files=files, device=device)
    return resolve_data(RunConfig(**options), facts)


def settings(
    images=500,
    side=96,
    device="cpu",
    *,
    files=False,
    layers=9,
    probed=True,
    positives=False,
    parameters=11_000_000,
    cores=2,
    **options,
):
    """What a run on `images` images of `side` pixels would use; `parameters`, `cores`, `layers`, `probed` and
    `positives` are said of its network and its objective."""
    config = data_settings(images, side, files=files, device=device, **options)
    with torch.device("meta"):
        backbone = timm.create_model(config.model, num_classes=0, **config.model_options)
    facts = NetworkFacts(
        images=images,
        parameters=parameters,
        layers=layers,
        prefers_adamw=prefers_adamw(backbone),
        memory_format=default_memory_format(backbone, device, config.image_size),
        stem="default",
        options={},
        probed=probed,
        positives=positives,
        device=device,
        precision="fp32",
        cores=cores,
        files=True,
    )
    return resolve(config, facts)
