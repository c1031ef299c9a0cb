"""Parses a command line with argparse. The options and their help come from the pydantic models."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nearkin.config import FREE
from nearkin.errors import ConfigError, printable
from nearkin.hints import unknown_option

REPEATABLE = frozenset({"log"})  # given several times, the values are one list with commas
DIGITS = 9  # of a whole number, which may become one of 32 bits
FREE_WORDS = tuple(f"--{group}." for group in FREE)  # their names are not known to argparse


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError and accepts no abbreviations."""

    def __init__(
        self,
        usage: str,
        description: str,
        more_help: Callable[[dict[str, Any]], str] | None = None,
        *,
        free: bool = False,
    ) -> None:
        """more_help: from the given options to text below the help. free: whether the verb takes the options of an
        objective and of a model."""
        super().__init__(
            usage=usage,
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        self.flags: set[str] = set()
        self._verb = " ".join(usage.split()[:2])
        self._more_help, self._free = more_help, free
        self.flag("help", "this help")

    def error(self, message: str) -> NoReturn:
        text = printable(message)
        raise ConfigError(f"{text[:1].upper()}{text[1:]}; see {self._verb} --help.")

    def flag(self, name: str, description: str) -> None:
        """`--name`, `--no-name`, `--name=true|false`; absent unless given."""
        self.flags.add(name)
        dest = name.replace("-", "_")
        self.add_argument(f"--{name}", dest=dest, action="store_true", help=description)
        self.add_argument(f"--no-{name}", dest=dest, action="store_false", help=argparse.SUPPRESS)

    def options(self, model: type[BaseModel], without: frozenset[str] = frozenset()) -> None:
        """One option per field of `model`."""
        for name, field in model.model_fields.items():
            if name in without:
                continue
            option, text = name.replace("_", "-"), describe(field)
            if bool in _members(field.annotation):
                self.flag(option, text)
            elif name in REPEATABLE:
                self.add_argument(
                    f"--{option}", dest=name, help=text, metavar="NAME", action=_Joined
                )
            else:
                self.add_argument(f"--{option}", dest=name, help=text, metavar=_kind(field))

    def help(self, given: dict[str, Any]) -> str:
        return self.format_help() + (self._more_help(given) if self._more_help else "")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The given options by name. Options like `--objective.topk 512` are kept as `objective.topk`.

        Raises ConfigError for an unknown option, with a hint where there is one.
        """
        end = list(argv).index("--") if "--" in argv else len(argv)  # only names of files follow
        words, free = self._split_free(["--help" if word == "-h" else word for word in argv[:end]])
        plain = [self._plain_flag(word) for word in words]
        found, rest = self.parse_known_intermixed_args([*plain, *argv[end:]])
        if rest:
            self._unknown(rest[0])
        return vars(found) | free

    def _plain_flag(self, word: str) -> str:
        """`--name=false` as `--no-name`."""
        name, equals, value = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and equals and name in self.flags):
            return word
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"--{name} takes true or false, not {printable(value)}.")
        return f"--{name}" if value.lower() == "true" else f"--no-{name}"

    def _split_free(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Separate the options of the objective and of the model, which are checked when these are known."""
        words: list[str] = []
        free: dict[str, Any] = {}
        left = list(argv)
        while left:
            word = left.pop(0)
            if not (self._free and word.startswith(FREE_WORDS)):
                words.append(word)
                continue
            name, equals, value = word.removeprefix("--").partition("=")
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else "true"
            free[name.replace("-", "_")] = value
        return words, free

    def _unknown(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise ConfigError(
                f"The word {printable(word)} is one too many; see {self._verb} --help."
            )
        known = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        raise unknown_option(word.partition("=")[0], known, otherwise=f"See {self._verb} --help.")


class _Joined(argparse.Action):
    def __call__(
        self, _: object, namespace: argparse.Namespace, value: Any, __: object = None
    ) -> None:
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, f"{earlier},{value}" if earlier else value)


def whole_number(name: str, text: str) -> int:
    """The value of an option as an integer >= 0. Raises ConfigError."""
    if not text.isdecimal():
        raise ConfigError(f"--{name} takes a whole number from 0, not {printable(text)}.")
    if len(text) > DIGITS:
        raise ConfigError(f"--{name} takes a whole number of at most {DIGITS} digits.")
    return int(text)


def number(name: str, text: str | None) -> float | None:
    """The value of an option as a finite number, or None where it is not given. Raises ConfigError."""
    if text is None:
        return None
    with suppress(ValueError):
        value = float(text)
        if math.isfinite(value):
            return value
    raise ConfigError(f"--{name} takes a number, not {printable(text)}.")


def options_table(model: type[BaseModel], prefix: str) -> str:
    """Help lines for an objective's own options."""
    rows = [
        f"  --{prefix}{name.replace('_', '-')} {_kind(field)}\n"
        f"                        {describe(field)}"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(rows) + "\n"


def describe(field: FieldInfo) -> str:
    """A field's description and default, safe for argparse's % formatting."""
    default = "none" if field.default is None else field.default
    return f"{field.description} [{default}]".replace("%", "%%")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: `int | Literal["auto"]` -> (int, "auto")."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    inner = get_args(annotation)
    return tuple(m for a in inner for m in _members(a)) if inner else (annotation,)


def _kind(field: FieldInfo) -> str:
    words = {int: "N", float: "X", bool: "", str: "NAME"}
    members = [m for m in _members(field.annotation) if m is not type(None)]
    shown = [m if isinstance(m, str) else words.get(m, "PATH") for m in members]
    return "|".join(shown)
