"""Strided convolutions of images that are smaller than the stride."""

from __future__ import annotations

from typing import Any

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
