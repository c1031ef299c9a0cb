"""The device and the precision of computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from nearkin.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


def choose_device(device: str) -> str:
    """`auto` becomes cuda or cpu: on mps nothing was ever tried. Raises ConfigError for a device that is not there."""
    gpu, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": gpu, "mps": mps, "cpu": True}
    if device == "auto":
        return "cuda" if gpu else "cpu"
    if not there[device]:
        raise ConfigError(
            f"--device {device} is not available here; use --device cpu or auto. A run that began on it goes on where "
            "there is one, or as a new run with --weights RUN."
        )
    return device


def choose_precision(precision: str, device: str) -> Precision:
    """`auto` becomes bf16 on a GPU that has it, fp16 on one that has not, fp32 elsewhere."""
    if precision == "auto":
        if device != "cuda":
            return "fp32"
        # Emulated, as on GPUs before Ampere, bf16 is slower than float32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device == "cpu":
        raise ConfigError("--precision fp16 does not train on a CPU; use --precision bf16 or fp32.")
    if precision == "fp64" and device == "mps":
        raise ConfigError("--precision fp64 does not exist on mps; use --device cpu.")
    return precision  # type: ignore[return-value]  # pydantic's Literal allows nothing else


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of float32 in float32, also where torch would take TF32 on a GPU."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
