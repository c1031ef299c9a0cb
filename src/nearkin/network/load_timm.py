"""Importing timm without the compiler that it does not use."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch


def load_timm() -> Any:
    """The module timm. Its first import leaves `torch._dynamo` out, which takes half of its time.

    Every import of timm in nearkin comes after a call of this function (docs/decisions/013).
    """
    # A later version may need more of torch._dynamo than the replacement has.
    with contextlib.suppress(ImportError, AttributeError), _without_dynamo():
        importlib.import_module("timm")
    return importlib.import_module("timm")


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Within the block `torch._dynamo` is a small replacement, unless it is loaded already.

    Two modules use it at import: torchvision.ops.roi_align takes `utils.is_compile_supported`, and timm's NaFlexViT
    applies `torch.compiler.disable`. Both get functions that load the compiler when they are called.
    """
    if "timm" in sys.modules or "torch._dynamo" in sys.modules:
        yield
        return
    dynamo, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    dynamo.disable, utils.is_compile_supported = _disable, _is_compile_supported  # type: ignore[attr-defined]
    dynamo.utils, dynamo.__path__ = utils, []  # type: ignore[attr-defined]
    replaced = {module.__name__: module for module in (dynamo, utils)}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]


def _disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    return torch._disable_dynamo(fn, recursive)  # torch's own form, which loads the compiler late


def _is_compile_supported(device_type: str) -> bool:
    utils = importlib.import_module("torch._dynamo.utils")
    return bool(utils.is_compile_supported(device_type))
