"""What `auto` means: the defaults of nearkin, in one place (docs/defaults.md explains them)."""

from __future__ import annotations

import math
import os
import re
from typing import Any, Literal

from nearkin.config import RunConfig
from nearkin.data.transforms import EvalSpec, TrainSpec
from nearkin.errors import ConfigError

DIGIT_LIKE = ("digits", "mnist", "svhn")
# Attention costs far more per weight and wants AdamW; timm names these families so.
TRANSFORMERS = re.compile(r"vit|deit|swin|beit|eva|cait|xcit|mixer|coat|twins|pvt|maxx?vit|former")
SMALL_WORK = 2e9
TINY_IMAGE, SMALL_IMAGE = 16, 64


def resolve_data(
    config: RunConfig, *, images: int, side: int, channels: int, room: int = 0
) -> RunConfig:
    """Everything that follows from the training images: their number and their median short side in pixels.

    room: bytes of memory that a cache may take; 0 where there are no files to decode.
    """
    size = min(side, 224) if config.image_size == "auto" else config.image_size
    batch = _batch_size(images) if config.batch_size == "auto" else config.batch_size
    augment = config.augment if config.augment != "auto" else _augment(config.objective)
    strong = augment == "strong"
    mirrored = augment != "none" and config.data not in DIGIT_LIKE
    eval_size = size if config.eval_size == "auto" else config.eval_size
    values: dict[str, Any] = {
        "image_size": size,
        "batch_size": batch,
        "augment": augment,
        "channels": channels,
        "model": default_model(size),
        "epochs": 12 if config.data == "digits" else max(30, min(100, 500_000 // max(images, 1))),
        "flip": mirrored,
        "eval_size": eval_size,
        "eval_crop": 1.0 if eval_size <= SMALL_IMAGE else 0.875,
        "mixup": 0.2 if strong else 0.0,
        "cutmix": 1.0 if strong else 0.0,
    }
    parts = TrainSpec.of(augment, image_size=size, channels=channels)
    filled = _fill(config, parts.model_dump() | values)
    fits = 4 * images * channels * size**2 <= room  # oblong images and other splits included
    exact = shrinks_exactly(filled) and filled.decode == "full"
    return _fill(filled, {"cache": "ram" if fits and exact else "off"})


def shrinks_exactly(config: RunConfig) -> bool:
    """Whether shrinking the images to `image_size` first changes no pixel that the network will see."""
    whole = config.crop_scale in ("padded", "centre")
    same = config.eval_size == config.image_size and config.eval_crop == 1
    return int(config.image_size) <= SMALL_IMAGE and whole and same


def read_whole(config: RunConfig) -> bool:
    """Whether batches come from one array in memory, faster than other processes could hand them over."""
    return config.cache != "off" and int(config.image_size) <= SMALL_IMAGE


def side_in_cache(config: RunConfig) -> int:
    """The short side of cached images: that of evaluation, which so sees the same pixels as without a cache; more where
    random regions would be enlarged from fewer pixels than the network reads. Source: our choice."""
    size, regions = int(config.image_size), not isinstance(config.crop_scale, str)
    return max(eval_spec(config).resize, round(size / 0.875) if regions else size)


def side_of_scaled(config: RunConfig) -> int:
    """The short side that scaled JPEGs keep: random regions have no fewer pixels than the network reads, as far as the
    original has them. Source: our choice."""
    share = 1.0 if isinstance(config.crop_scale, str) else config.crop_scale
    return math.ceil(int(config.image_size) / math.sqrt(share))


def eval_spec(config: RunConfig) -> EvalSpec:
    """How images are evaluated."""
    return EvalSpec.for_size(int(config.eval_size), int(config.channels), float(config.eval_crop))


def resolve_training(
    config: RunConfig,
    *,
    images: int,
    files: bool,
    weights: int,
    layered: bool,
    device: str,
    ranks: int,
    precision: str = "fp32",
) -> RunConfig:
    """Everything that follows from the network, the device and the processes on it.

    weights: how many the backbone has. layered: whether it names its layers. precision: that the runtime has.
    """
    batch = int(config.batch_size)
    pretrained = config.pretrained or config.weights is not None
    adam = pretrained or TRANSFORMERS.search(config.model) is not None
    optimizer = config.optimizer if config.optimizer != "auto" else ("adamw" if adam else "sgd")
    cores = max(1, (os.cpu_count() or 1) // ranks)
    small = weights * int(config.image_size) ** 2 < SMALL_WORK
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": _lr(optimizer, pretrained, int(config.image_size)) * batch / 256,
        "weight_decay": 0.05 if optimizer != "sgd" else (5e-4 if images < 100_000 else 1e-4),
        "layer_decay": 0.75 if pretrained and layered and optimizer == "adamw" else 1.0,
        "warmup_epochs": 0.05 * int(config.epochs),
        "memory_format": _memory_format(config, device),
        "device": device,
        "precision": precision,
        "threads": 1 if small else cores,
        "workers": min(8, cores) if files else 0,
    }
    return _fill(config, values)


def default_model(image_size: int) -> str:
    """resnet10t up to 16 pixels, resnet18 above."""
    return "resnet10t" if image_size <= TINY_IMAGE else "resnet18"


def check(config: RunConfig, *, images: int, world_size: int) -> None:
    """Raises ConfigError for numbers that do not fit together."""
    batch, parts = int(config.batch_size), world_size * config.accumulate
    if batch > images:
        raise ConfigError(
            f"--batch-size {batch} is larger than the {images} training images; "
            f"use at most {images}."
        )
    if batch % parts:
        near = ", ".join(
            str(v) for v in (batch // parts * parts, (batch // parts + 1) * parts) if v
        )
        raise ConfigError(
            f"--batch-size {batch} cannot be divided among {world_size} processes x "
            f"--accumulate {config.accumulate}; use {near}."
        )
    if (float(config.mixup) > 0 or float(config.cutmix) > 0) and (batch // parts) % 8:
        raise ConfigError(
            f"Mixing needs a multiple of 8 images per process and part, not {batch // parts}; use "
            f"--batch-size {max(1, batch // parts // 8) * 8 * parts} or --mixup 0 --cutmix 0."
        )
    if config.decode == "scaled" and config.cache != "off":
        raise ConfigError(
            f"--decode scaled is for images that are decoded anew in every epoch, --cache {config.cache} decodes them "
            "once; use one of them."
        )
    _check_sampler(config, batch)


def _check_sampler(config: RunConfig, batch: int) -> None:
    size = config.per_class
    if config.sampler == "balanced" and batch % size:
        near = ", ".join(str(v) for v in (batch // size * size, (batch // size + 1) * size) if v)
        raise ConfigError(
            f"--batch-size {batch} holds no whole number of groups of --per-class {size}; use {near}, or "
            "another --per-class."
        )
    if config.repeats > 1 and config.sampler != "shuffle":
        raise ConfigError(
            f"--repeats {config.repeats} needs --sampler shuffle, not {config.sampler}."
        )
    if config.repeats > batch:
        raise ConfigError(f"--repeats {config.repeats} is more than --batch-size {batch}.")


def _fill(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: value for name, value in values.items() if getattr(config, name) == "auto"}
    )


def _memory_format(config: RunConfig, device: str) -> Literal["contiguous", "channels_last"]:
    """channels_last, in which convolutions are faster; but on a CPU tiny images and transformers gain nothing by it,
    and on mps it has been seen to compute something else."""
    gains = int(config.image_size) > TINY_IMAGE and TRANSFORMERS.search(config.model) is None
    return "channels_last" if device == "cuda" or (device == "cpu" and gains) else "contiguous"


def _batch_size(images: int) -> int:
    """The power of two nearest N / 48, within 16 ... 128, never above N."""
    powers = [p for p in (1, 2, 4, 8, 16, 32, 64, 128) if p <= images]
    usual = [p for p in powers if p >= 16] or powers[-1:] or [1]
    return min(usual, key=lambda power: abs(power - images / 48))


def _augment(objective: str) -> Literal["light", "strong"]:
    return "strong" if objective == "attract-repulse" else "light"


def _lr(optimizer: str, pretrained: bool, image_size: int) -> float:
    """Per 256 images. Small images: 0.1 at a batch of 128, as is usual there (docs/decisions/005)."""
    if optimizer == "sgd":
        return 0.2 if image_size <= SMALL_IMAGE else 0.1
    return 1e-4 if pretrained else 5e-4
