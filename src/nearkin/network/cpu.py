"""Code that is needed only because torch is slow or wrong on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def fill_strides(network: nn.Module) -> None:
    """Pad the input of every convolution with a stride, by zeros to the right and below, to at least stride x stride.

    Without this, oneDNN (3.13, torch 2.15) leaves parts of the gradient of the weights unwritten in bfloat16 on CPUs
    that multiply in it, and a run ends with weights that are not finite. It happens to small images in the last blocks
    of a network (8 pixels in `test_resnet`). The output stays the same: a convolution that pads by half its kernel has
    one output for 1 to `stride` pixels, and the added zeros replace zeros of its own padding.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _pads_by_half(module):
            module.register_forward_pre_hook(_pad_to_stride)


def _pads_by_half(conv: nn.Conv2d) -> bool:
    """Whether the convolution has a stride and pads by half its kernel with zeros."""
    if max(conv.stride) == 1 or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    sides = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return all(2 * padding == dilation * (kernel - 1) for padding, dilation, kernel in sides)


def _pad_to_stride(conv: nn.Conv2d, inputs: tuple[Any, ...]) -> Tensor | None:
    images: Tensor = inputs[0]
    rows, columns = (max(0, s - n) for s, n in zip(conv.stride, images.shape[-2:], strict=True))
    return pad(images, (0, columns, 0, rows)) if rows or columns else None


MOST_TOKENS = 256  # plain products keep tokens x tokens weights for each head and image


def avoid_slow_attention(network: nn.Module) -> None:
    """Let timm's attention modules use plain matrix products on a CPU where torch's fused kernel is slow or differs.

    Slow: the backward pass under autocast. A whole step of `vit_tiny_patch16_224` at 64 pixels takes 1.9 times as long
    in bfloat16, of `test_vit` 2.2 times; in float32 both paths take the same time. Different: with a learned
    position bias torch takes another kernel in passes with gradient than in passes without.
    timm's own switch, `set_fused_attn`, holds for every model of the process; this sets the attribute of each module.
    """
    for module in network.modules():
        if getattr(module, "fused_attn", None) is True:
            module.register_forward_pre_hook(_choose_attention)


def _choose_attention(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
    """inputs: the tokens first. Under autocast, tokens of another shape than `[B, N, C]` keep the fused kernel."""
    plain = False
    if inputs and inputs[0].device.type == "cpu":
        few = inputs[0].dim() == 3 and inputs[0].shape[1] <= MOST_TOKENS
        # timm keeps a learned bias of the products as `rel_pos`, or as a parameter of the module's own.
        own = next(attention.parameters(recurse=False), None)
        biased = own is not None or getattr(attention, "rel_pos", None) is not None
        plain = biased or (few and torch.is_autocast_enabled("cpu"))
    attention.fused_attn = not plain  # type: ignore[assignment]
