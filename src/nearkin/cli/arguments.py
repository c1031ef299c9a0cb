"""Words of a command line -> flat options. The options come from the pydantic models; argparse reads them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nearkin.config import FREE
from nearkin.errors import ConfigError, nearest, printable

FREE_WORDS = tuple(f"--{room}." for room in FREE)  # argparse does not know what comes after


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are our errors, and which abbreviates nothing."""

    def __init__(self, usage: str, description: str) -> None:
        super().__init__(
            usage=usage,
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        self.flags: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see nearkin --help.")

    def flag(self, name: str, description: str) -> None:
        """`--name`, `--no-name`, `--name=true|false`; absent unless given."""
        self.flags.add(name)
        to = name.replace("-", "_")
        self.add_argument(f"--{name}", dest=to, action="store_true", help=description)
        self.add_argument(f"--no-{name}", dest=to, action="store_false", help=argparse.SUPPRESS)

    def options(self, model: type[BaseModel], without: frozenset[str] = frozenset()) -> None:
        """One option per field of `model`."""
        for name, field in model.model_fields.items():
            if name in without:
                continue
            option, text = name.replace("_", "-"), describe(field)
            if bool in _members(field.annotation):
                self.flag(option, text)
            else:
                self.add_argument(f"--{option}", dest=name, help=text, metavar=_kind(field))

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was given, by option name. Words like `--objective.topk 512` are kept as `objective.topk`.

        Raises ConfigError for an unknown option, naming the nearest.
        """
        words, free = self._free(["--help" if word == "-h" else word for word in argv])
        found, rest = self.parse_known_intermixed_args(self._plain_flags(words))
        if rest:
            self._unknown(rest[0])
        return vars(found) | free

    def _plain_flags(self, argv: Sequence[str]) -> list[str]:
        words = []
        for word in argv:
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and equals and name in self.flags:
                if value.lower() not in ("true", "false"):
                    raise ConfigError(f"--{name} takes true or false, not {printable(value)}.")
                word = f"--{name}" if value.lower() == "true" else f"--no-{name}"
            words.append(word)
        return words

    def _free(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Take out the options of the objective and of the model, which are known once torch is loaded."""
        words: list[str] = []
        free: dict[str, Any] = {}
        left = list(argv)
        while left:
            word = left.pop(0)
            if not word.startswith(FREE_WORDS):
                words.append(word)
                continue
            name, equals, value = word.removeprefix("--").partition("=")
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else "true"
            free[name.replace("-", "_")] = value
        return words, free

    def _unknown(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise ConfigError(f"Nothing expects the word {printable(word)}; see nearkin --help.")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        name = word.partition("=")[0]
        raise ConfigError(f"Unknown option {printable(name)}.{nearest(name, known)}")


def whole_number(name: str, text: str) -> int:
    """An option's value as a number from 0. Raises ConfigError."""
    if not text.isdecimal():
        raise ConfigError(f"--{name} takes a whole number from 0, not {printable(text)}.")
    return int(text)


def show_help(parser: Parser, extra: str = "") -> None:
    """The verb's help on stdout."""
    sys.stdout.write(parser.format_help() + extra)


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
