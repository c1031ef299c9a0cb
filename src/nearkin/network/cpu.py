"""What exists only because a CPU is slow or wrong there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def fill_strides(network: nn.Module) -> None:
    """Let every convolution with a stride see images at least as large as it, by zeros to the right and below.

    The output stays the same: padded by half its kernel, a convolution of 1 to `stride` pixels has one output, and
    what is added takes the place of zeros that its own padding gives. But without them oneDNN (3.13, torch 2.15) leaves
    parts of the weights' gradient unwritten in bfloat16 on a processor that has it, and a run ends with weights that
    are not finite. Small images meet this in the last blocks of a network: 8 pixels in `test_resnet`.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _halves(module):
            module.register_forward_pre_hook(_filled)


def _halves(conv: nn.Conv2d) -> bool:
    """Whether it has a stride and pads by half its kernel with zeros."""
    if max(conv.stride) == 1 or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    sides = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return all(2 * padding == dilation * (kernel - 1) for padding, dilation, kernel in sides)


def _filled(conv: nn.Conv2d, given: tuple[Any, ...]) -> Tensor | None:
    images: Tensor = given[0]
    rows, columns = (max(0, s - n) for s, n in zip(conv.stride, images.shape[-2:], strict=True))
    return pad(images, (0, columns, 0, rows)) if rows or columns else None


# Up to so many tokens plain products take less time, forward and backward together, and their weights, N x N for each
# head, little memory. Measured: docs/performance.md.
FEW = {torch.float32: 128, torch.bfloat16: 256}


def choose_attention(network: nn.Module) -> None:
    """Let each of timm's attentions choose its path anew in every pass, where both compute the same.

    On a processor the fused kernel's backward is slow where tokens are few: 17 of them in a ViT at 64 pixels take six
    times as long in bfloat16. timm has both paths in each module, behind its own switch (`fused_attn`).
    """
    for module in network.modules():
        if getattr(module, "fused_attn", None) is True:
            module.register_forward_pre_hook(_chosen)


def _chosen(attention: nn.Module, given: tuple[Any, ...]) -> None:
    attention.fused_attn = not (given and _few(given[0]))  # type: ignore[assignment]


def _few(tokens: Tensor) -> bool:
    """tokens: `[B, N, C]`; of what has another shape, the number is not known here."""
    if tokens.device.type != "cpu" or tokens.dim() != 3:
        return False
    halved = torch.is_autocast_enabled("cpu")
    few = FEW.get(torch.get_autocast_dtype("cpu") if halved else tokens.dtype, 0)
    # Most of the gain is in the backward.
    return tokens.shape[1] <= (few if torch.is_grad_enabled() else few // 4)
