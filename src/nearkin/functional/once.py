"""Backward passes that cannot be differentiated again say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of an autograd function, without a graph of its own.

    Raises RuntimeError under create_graph=True. torch's once_differentiable does so only when the
    upstream gradient has a graph, and else leaves the second derivative out in silence.
    """

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The pairs of a large batch can be differentiated once only; "
                "create_graph=True needs a smaller batch."
            )
        return backward(*args)

    return run
