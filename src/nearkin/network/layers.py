"""The order of a backbone's layers, as timm names them: learning rates by layer, and which blocks learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from nearkin.errors import ConfigError

HEADS = "\0heads"  # a name that no matcher knows is put into the topmost layer


def count_layers(backbone: nn.Module) -> int:
    """Layers below the heads, as `layer_scales` counts them; 0 for a backbone that does not name its layers."""
    return max(_depths(backbone, coarse=False).values()) if names_layers(backbone) else 0


def names_layers(backbone: nn.Module) -> bool:
    """Whether a backbone says which layer each parameter belongs to."""
    return callable(getattr(backbone, "group_matcher", None))


def layer_scales(backbone: nn.Module, decay: float) -> dict[str, float]:
    """For each of the backbone's parameters, decay^(layers between it and the heads).

    The layers are the backbone's own (timm's `group_matcher`); the heads are the layer above. Modules after the last
    block, like a final norm, belong to the heads. In a ViT of depth D, then: patch embedding and tokens
    decay^(D+1), block i from 0 decay^(D-i), final norm 1. Source: Bao et al., BEiT, 2021, published code.

    Raises ConfigError for a backbone that does not name its layers.
    """
    return {name: decay**depth for name, depth in _depths(backbone, coarse=False).items()}


def blocks_below_heads(backbone: nn.Module) -> dict[str, int]:
    """For each of the backbone's parameters, the number of its block counted from the heads: 1 for the last block, the
    highest for the stem, 0 for modules after the last block. Blocks are timm's coarse groups: the stages of a
    convolutional network, the blocks of a transformer.

    Raises ConfigError for a backbone that does not name its layers.
    """
    return _depths(backbone, coarse=True)


def _depths(backbone: nn.Module, *, coarse: bool) -> dict[str, int]:
    from timm.models._manipulate import group_with_matcher

    if not names_layers(backbone):
        raise ConfigError(
            "This --model does not name its layers; leave out --layer-decay and --blocks."
        )
    names = [HEADS, *(name for name, _ in backbone.named_parameters())]
    try:
        matcher: Any = backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
    except AssertionError:  # RDNet has no coarse groups
        matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
    layers: Mapping[str, int] = group_with_matcher(
        ((name, name) for name in names), _without_closing(matcher), reverse=True
    )
    return {name: layers[HEADS] - layers[name] for name in names[1:]}


def _without_closing(matcher: Any) -> Any:
    """timm's matcher without the entries that join the modules after the last block to that block."""
    from timm.models._manipulate import MATCH_PREV_GROUP

    def closes(entry: Any) -> bool:
        pattern, suffix = entry
        return bool(suffix == MATCH_PREV_GROUP and re.compile(pattern).groups == 0)

    if not isinstance(matcher, dict):
        return matcher  # a function: nothing to remove
    return {
        group: entries
        if isinstance(entries, str | None)
        else [entry for entry in entries if not closes(entry)]
        for group, entries in matcher.items()
    }
