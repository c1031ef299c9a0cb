"""Attention among few tokens on a processor: plain products instead of the fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
