"""What nearkin says when something is wrong: one clear sentence and the exit code that fits it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class NearkinError(Exception):
    """An error a person can act on. Its text is one sentence: what is wrong, where, what to do."""

    code = 1


class ConfigError(NearkinError):
    """An option, a model name, an objective name or a combination of them that cannot be (exit 2)."""

    code = 2


class DataError(NearkinError):
    """Images, labels or splits that cannot be trained on (exit 3)."""

    code = 3


class ModelError(NearkinError):
    """A checkpoint, a run or weights that do not fit or cannot be had (exit 4)."""

    code = 4


class DivergedError(NearkinError):
    """The loss is no longer finite, or the memory ran out (exit 6)."""

    code = 6


class Stopped(NearkinError):
    """A signal asked the run to stop; everything is saved and the run can be resumed (exit 75)."""

    code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def printable(text: str) -> str:
    """`text` on one line, with control characters, bidirectional marks and bytes that are not UTF-8 escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


SHOWN = 5


def listed(names: Sequence[str]) -> str:
    """At most five names on one line, in the order given, and how many more there are."""
    text = ", ".join(printable(name) for name in names[:SHOWN])
    return f"{text} and {len(names) - SHOWN} more" if len(names) > SHOWN else text


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 image`, `2 images`, `1 class`, `2 classes`."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
