"""Options of the timm model itself, `--model.NAME VALUE`. A stranger's model.json holds them, too."""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from nearkin.errors import ConfigError, printable

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
LARGEST = 1 << 14  # above every width and depth in use; what a number can cost stays bounded
LONGEST = 16  # numbers in a list
MOST = 32  # options
# What timm's builders read themselves: files, weights, the form of the result; or what has an option of its own.
RESERVED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "drop_path_rate",
        "drop_rate",
        "dtype",
        "exportable",
        "feature_cfg",
        "feature_cls",
        "features_only",
        "global_pool",
        "img_size",
        "in_chans",
        "kwargs",
        "kwargs_filter",
        "model_cfg",
        "model_cls",
        "model_name",
        "no_jit",
        "num_classes",
        "out_indices",
        "pruned",
        "scriptable",
        "variant",
    }
)
INSTEAD = {
    "checkpoint_path": "--weights",
    "drop_path_rate": "--drop-path",
    "drop_rate": "--drop-rate",
    "img_size": "--image-size",
    "in_chans": "--channels",
    "pretrained": "--pretrained",
}


def checked_model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with command-line words turned into values.

    Allowed are finite numbers, true, false, and lists of up to 16 of them: values that can name no file, class or
    address. The names that timm's builders keep for themselves are refused. Whether a model takes an option shows when
    it is built. Source: our choice.

    Raises ConfigError that names the option.
    """
    if len(options) > MOST:
        raise ConfigError(f"More than {MOST} options --model.NAME; give fewer.")
    return {_name(name): _value(name, value) for name, value in options.items()}


ModelOptions = Annotated[dict[str, Any], AfterValidator(checked_model_options)]


def _name(name: str) -> str:
    if name in RESERVED or name.startswith("pretrained"):
        instead = f"; use {INSTEAD[name]}" if name in INSTEAD else "; leave it out"
        raise ConfigError(f"--model.{name} cannot be set{instead}.")
    if not NAME.fullmatch(name):
        raise ConfigError(f"--model.{printable(name)[:80]} is no name of an option of a model.")
    return name


def _value(name: str, value: Any) -> Any:
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, list | tuple):
        if 0 < len(value) <= LONGEST and all(_is_number(v) for v in value):
            return list(value)
    elif _is_number(value):
        return value
    shown = printable(str(value)[:80])
    raise ConfigError(
        f"--model.{name} {shown!r} is not valid: give a number up to {LARGEST}, true, false, "
        f"or a list of up to {LONGEST} of them."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST  # false for nan


def _parsed(word: str) -> Any:
    """A word of the command line as YAML reads it; also numbers like 1e-3, which YAML takes for words."""
    if len(word) > 200:
        return word
    try:
        value = yaml.safe_load(word)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError, ValueError):
        return word
