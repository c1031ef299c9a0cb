"""In which precision the mathematics is done, whatever the network ran in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from nearkin.functional.labels import SoftPairs

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` in float64 when its first argument is float64, else in float32, with autocast off.

    All floating tensors among the arguments are cast to that type. A cast is part of the graph, so
    gradients come back in the type of each input. Source: our choice.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        leading = cast(Tensor, args[0] if args else kwargs[first])
        dtype = torch.float64 if leading.dtype == torch.float64 else torch.float32
        positional = [_in_dtype(value, dtype) for value in args]
        named = {name: _in_dtype(value, dtype) for name, value in kwargs.items()}
        with torch.autocast(leading.device.type, enabled=False):
            return cast(Callable[..., R], function)(*positional, **named)

    return run


def _in_dtype(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, SoftPairs):
        return SoftPairs(value.labels, value.weights.to(dtype))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
