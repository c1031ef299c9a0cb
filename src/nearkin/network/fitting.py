"""What timm raises while a backbone is built, as one sentence that names the option to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nearkin.errors import ConfigError, printable

MOST_WEIGHTS = 1 << 31  # a file of them could not be read back
# What a timm model raises when a size, a channel count or an option does not suit it.
UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def with_options(model: str, options: Mapping[str, Any]) -> str:
    """The model and its options in words."""
    shown = ", ".join(f"--model.{name} {value}" for name, value in options.items())
    return f"{model} with {shown}" if shown else model


@contextmanager
def taking(model: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Names the option that the model does not take."""
    try:
        yield
    except TypeError as error:
        name = next(
            (n for n in options if f"unexpected keyword argument '{n}'" in str(error)), None
        )
        if name is None:
            raise
        raise ConfigError(f"{model} takes no option {name}; leave out --model.{name}.") from None


@contextmanager
def bounded() -> Iterator[None]:
    """Ends the building of a model whose weights would fill the memory; options from a stranger's file may ask that."""
    left = MOST_WEIGHTS

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.numel()
        if left < 0:
            raise ValueError(f"it has more than {MOST_WEIGHTS} weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def fitting(
    model: str, channels: int, image_size: int, option: str = "--image-size"
) -> Iterator[None]:
    """Turns what timm raises inside the block into a ConfigError."""
    try:
        yield
    except UNFIT as error:
        if isinstance(error, TypeError) and "drop_path" in str(error):
            raise ConfigError(f"{model} has no stochastic depth; leave out --drop-path.") from None
        raise ConfigError(
            f"{model} cannot take images of {image_size} x {image_size} pixels and {channels} channels "
            f"({first_line(error)}); try another {option} or --model."
        ) from error


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200])
