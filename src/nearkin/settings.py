"""The settings of a run: every option with the value that is used. Imports no torch.

`RunConfig` (options as given) -> `DataSettings` (the images are known) -> `Settings` (network and machine are known).
The rules are in `nearkin.training.defaults`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nearkin.config import (
    Amount,
    Count,
    Fraction,
    Magnitude,
    Natural,
    Positive,
    Probability,
    RunConfig,
    Side,
)


class DataSettings(RunConfig):
    """A configuration without `auto` in the options that follow from the training images."""

    objective: str
    epochs: Natural
    minutes: Amount
    pretrained: bool
    batch_size: Count
    image_size: Side
    channels: Count
    augment: Literal["none", "light", "medium", "strong"]
    crop_scale: Fraction | Literal["padded", "centre"]
    randaugment: Magnitude
    jitter: Annotated[float, Field(ge=0, le=2)]
    jitter_prob: Probability
    grey_prob: Probability
    erasing: Probability
    flip: bool
    mixup: Amount
    cutmix: Amount
    eval_size: Side
    eval_crop: Annotated[float, Field(ge=0.1, le=1)]
    cache: Literal["off", "ram", "disk"]


class Settings(DataSettings):
    """A configuration without any `auto`: what a run uses, stores as config.yaml, prints and compares on resume.

    It is a `RunConfig` as well, so its YAML can be given to `--config`. `options` are the objective's, resolved.
    """

    stem: Literal["default", "small"]
    probe: bool
    probe_images: Count
    sampler: Literal["shuffle", "balanced", "weighted"]
    blocks: Natural | Literal["all"]
    freeze_batchnorm: bool
    workers: Natural
    optimizer: Literal["sgd", "adamw", "lamb"]
    lr: Amount
    warmup_epochs: Amount
    weight_decay: Amount
    layer_decay: Fraction
    head_lr: Positive
    precision: Literal["fp32", "bf16", "fp16", "fp64"]
    memory_format: Literal["contiguous", "channels_last"]
    device: Literal["cpu", "cuda", "mps"]
    threads: Count
