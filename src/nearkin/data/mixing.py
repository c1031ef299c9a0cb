"""mixup and CutMix, the same on any number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.sampling import keyed_rng
from nearkin.errors import ConfigError

BLOCK = 8  # partners come from as many consecutive positions of the global batch


class _Plan(NamedTuple):
    """How one block is mixed: partner (i + shift) mod 8, share of the image itself, box cut from the partner."""

    shift: int
    share: float
    box: tuple[int, int, int, int]  # top, bottom, left, right; empty for mixup


def mix(
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    *,
    classes: int,
    mixup: float,
    cutmix: float,
    seed: int,
    step: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every image x_i with a partner x_p of its block of 8 positions; all views alike.

    mixup:  lam x_i + (1 - lam) x_p, lam ~ Beta(mixup, mixup) (Zhang et al. 2018, section 2).
    CutMix: x_p inside a box, x_i elsewhere; the box has the share 1 - lam of the area before it is
            clipped, lam ~ Beta(cutmix, cutmix), and lam is then the true share of x_i (Yun et al. 2019,
            section 3.1).
    With both above 0 a step takes one of them, each with probability 1/2. lam, box and partners are drawn
    per block and keyed by (seed, step, position): mixing a batch is mixing its blocks.

    images: `[V, b, C, H, W]` float. labels, index: `[b]`; b is a multiple of 8. classes: K.
    offset: position of the first row in the global batch, a multiple of 8.
    Returns images as given, labels `[b, K]` = lam e_yi + (1 - lam) e_yp (at least float32), index `[b, 2]`
    with the partner's id second. Raises ConfigError for another b or offset, or two strengths of 0.
    """
    count, size, device = len(labels), images.shape[-2:], images.device
    if count % BLOCK or offset % BLOCK:
        raise ConfigError(
            f"Mixing needs a multiple of {BLOCK} images per process, not {count} at {offset}; "
            "change --batch-size, or use --mixup 0 --cutmix 0."
        )
    cut = _cuts(mixup, cutmix, seed, step)
    plans = [
        _plan(cutmix if cut else mixup, cut, size, seed, step, position)
        for position in range(offset, offset + count, BLOCK)
    ]
    shares = np.repeat([plan.share for plan in plans], BLOCK)
    places, shifts = np.arange(count), np.repeat([plan.shift for plan in plans], BLOCK)
    partners = _to(places // BLOCK * BLOCK + (places + shifts) % BLOCK, device)
    if cut:
        inside = _to(_masks(plans, size), device).repeat_interleave(BLOCK, 0)
        mixed = torch.where(inside, images[:, partners], images)
    else:
        mixed = _blend(images, images[:, partners], shares)
    hard = labels[:, None] == torch.arange(classes, device=device)
    rows = hard.to(torch.promote_types(images.dtype, torch.float32))
    soft = _blend(rows[None], rows[None, partners], shares)[0]
    return mixed, soft, torch.stack([index, index[partners]], 1)


def _cuts(mixup: float, cutmix: float, seed: int, step: int) -> bool:
    """Whether this step takes CutMix: keyed so that all ranks agree."""
    if mixup <= 0 and cutmix <= 0:
        raise ConfigError("Mixing needs --mixup or --cutmix above 0.")
    both = mixup > 0 and cutmix > 0
    return bool(keyed_rng("mix or cut", seed, step).random() < 0.5) if both else cutmix > 0


def _masks(plans: list[_Plan], size: torch.Size) -> NDArray[np.bool_]:
    """True inside each block's box, `[b / 8, 1, H, W]`."""
    masks = np.zeros((len(plans), 1, *size), dtype=bool)
    for mask, plan in zip(masks, plans, strict=True):
        top, bottom, left, right = plan.box
        mask[..., top:bottom, left:right] = True
    return masks


def _plan(
    strength: float, cut: bool, size: torch.Size, seed: int, step: int, position: int
) -> _Plan:
    rng = keyed_rng("mixing", seed, step, position)
    shift = int(rng.integers(1, BLOCK))
    share = float(rng.beta(strength, strength))
    if not cut:
        return _Plan(shift, share, (0, 0, 0, 0))
    height, width = size
    side = np.sqrt(1 - share)
    top, bottom = _clipped(int(rng.integers(height)), side * height, height)
    left, right = _clipped(int(rng.integers(width)), side * width, width)
    area = (bottom - top) * (right - left)
    return _Plan(shift, 1 - area / (height * width), (top, bottom, left, right))


def _clipped(centre: int, length: float, limit: int) -> tuple[int, int]:
    half = int(length) // 2
    return max(0, centre - half), min(limit, centre + half)


def _blend(own: Tensor, partner: Tensor, shares: NDArray[np.float64]) -> Tensor:
    """lam own + (1 - lam) partner, `[V, b, ...]`; no fused operation, whose rounding depends on the shape."""
    shape = (-1, *[1] * (own.ndim - 2))
    first, second = (  # cast before they move: mps has no float64
        torch.from_numpy(part.reshape(shape)).to(own.dtype).to(own.device, non_blocking=True)
        for part in (shares, 1 - shares)
    )
    return own * first + partner * second


def _to(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
