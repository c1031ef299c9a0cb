"""Hints for names that nearkin does not know: typing mistakes, and the names that other tools use (hints.yaml)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nearkin.errors import ConfigError, most_similar, nearest, printable

MISTYPED = 0.9  # least similarity to another tool's word: below it --crop is --drop, and --max-time is --max-iter


@cache
def tables() -> dict[str, Any]:
    """`options`, `answers` and `values` of hints.yaml: our name or sentence -> other names, in one string."""
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return found


def plain(name: str) -> str:
    """A name as the tables spell it: lower case, hyphens, without leading hyphens."""
    return name.lower().replace("_", "-").lstrip("-")


def unknown_option(
    shown: str, known: Iterable[str], *, prefix: str = "--", otherwise: str = ""
) -> ConfigError:
    """The error for an option that is none of `known`, with a hint where there is one.

    shown: the option as it was given. prefix: what precedes the names of `known`, `--` or `--objective.`; the options
    of an objective have names of their own. otherwise: the hint where no name is similar.
    """
    names = {plain(option): option.replace("_", "-") for option in known}
    hints = {option: f"Did you mean {prefix}{name}?" for option, name in names.items()}
    if prefix == "--":
        others = dict(tables()["answers"])
        for option, words in tables()["options"].items():
            if option.split()[0] in names:
                others[f"nearkin calls it --{option}."] = words
        hints = {word: hint for hint, words in others.items() for word in words.split()} | hints
    word = plain(shown.removeprefix(prefix))
    hint = hints.get(most_similar(word, hints, MISTYPED) or most_similar(word, names), otherwise)
    return ConfigError(f"Unknown option {printable(shown)}.{hint and ' '}{hint}")


def value_hint(option: str, value: str, allowed: Iterable[str]) -> str:
    """` Did you mean X?` for the allowed value that is meant by `value`, or an empty string."""
    names = list(allowed)
    for name, others in tables()["values"].get(plain(option), {}).items():
        if name in names and plain(value) in others.split():
            return f" Did you mean {name}?"
    return nearest(value.lower(), names)
