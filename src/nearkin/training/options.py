"""The options of `nearkin.train` with their types; a test compares them with `RunConfig`, which describes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from nearkin.config import Auto


class TrainOptions(TypedDict, total=False):
    """Every option of `nearkin train` besides DATA, `--objective` and the objective's own."""

    seed: int
    epochs: int | Auto
    minutes: float | Auto
    batch_size: int | Auto
    accumulate: int
    batchnorm_by_parts: bool
    model: str
    model_options: Mapping[str, Any]
    pretrained: bool
    from_scratch: bool
    weights: str | Path | None
    probe: bool | Auto
    probe_images: int | Auto
    refit: bool
    blocks: int | Literal["auto", "all"]
    image_size: int | Auto
    channels: int | Auto
    stem: Literal["auto", "default", "small"]
    drop_rate: float
    drop_path: float
    freeze_batchnorm: bool | Auto
    freeze_backbone: bool
    val_split: float
    split_seed: int | None
    images_per_class: int | None
    bad_images: Literal["error", "skip"]
    check: Literal["auto", "full", "headers"]
    augment: Literal["auto", "none", "light", "medium", "strong"]
    crop_scale: float | Literal["auto", "padded", "centre"]
    randaugment: int | Auto
    jitter: float | Auto
    jitter_prob: float | Auto
    grey_prob: float | Auto
    erasing: float | Auto
    flip: bool | Auto
    mixup: float | Auto
    cutmix: float | Auto
    eval_size: int | Auto
    eval_crop: float | Auto
    sampler: Literal["auto", "shuffle", "balanced", "weighted"]
    per_class: int
    repeats: int
    class_weights: Literal["none", "balanced"]
    cache: Literal["auto", "off", "ram", "disk"]
    decode: Literal["full", "scaled"]
    workers: int | Auto
    optimizer: Literal["auto", "sgd", "adamw", "lamb"]
    lr: float | Auto
    head_lr: float | Auto
    min_lr_ratio: float
    warmup_epochs: float | Auto
    weight_decay: float | Auto
    decay_all: bool
    momentum: float
    nesterov: bool
    layer_decay: float | Auto
    clip_grad: float | None
    ema: float
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"]
    memory_format: Literal["auto", "contiguous", "channels_last"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int | Auto
    autotune: bool
    compile: bool
    out: str | Path | None
    log: str | None
    log_every: int
    save_minutes: float
    log_level: Literal["info", "warning", "error"]
