"""Importing timm and torchvision without torch's compiler, which takes half of the time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

_LOCK = threading.Lock()  # of the replacement, which is one for all threads


def import_eager(name: str) -> Any:
    """The module `name` of timm or torchvision; its first import does not load `torch._dynamo`.

    `import timm` takes 2.9 s beyond torch with it and 0.7 s without (docs/decisions/013-start-up.md).
    """
    with _LOCK:
        if name not in sys.modules and "torch._dynamo" not in sys.modules:
            # A later version may need more of torch._dynamo than the replacement has: then it is imported with it.
            with contextlib.suppress(ImportError, AttributeError), _without_dynamo():
                import_module(name)
    return import_module(name)


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Within the block `torch._dynamo` is a small replacement.

    At import torchvision.ops.roi_align takes `utils.is_compile_supported` from it, and torchvision.tv_tensors and
    timm.models.naflexvit apply `torch.compiler.disable`. They get functions that load the compiler when called.
    """
    from torch._compile import _disable_dynamo  # torch's own form, which loads the compiler late

    def disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
        return _disable_dynamo(fn, recursive)

    def is_compile_supported(device_type: str) -> bool:
        return bool(import_module("torch._dynamo.utils").is_compile_supported(device_type))

    dynamo, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    vars(utils).update(is_compile_supported=is_compile_supported)
    vars(dynamo).update(disable=disable, utils=utils, __path__=[])
    sys.modules.update({module.__name__: module for module in (dynamo, utils)})
    try:
        yield
    finally:
        for module in (dynamo, utils):
            del sys.modules[module.__name__]
