"""Replacing modules inside a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def swap_modules(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`root` with each key of `replacements` replaced by its value, wherever it occurs.

    Works in place; only when `root` itself is a key is another module returned. A module that is used in two
    places stays one module.
    """
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(root, root)
