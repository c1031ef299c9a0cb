"""The exceptions of nearkin, each with its exit code, and the formatting of names in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class NearkinError(Exception):
    """Base class. The message is one sentence: what is wrong, where, what to do. `code`: the exit code."""

    code = 1


class ConfigError(NearkinError):
    """An option, a name or a combination of options is not valid (exit 2)."""

    code = 2


class DataError(NearkinError):
    """Images, labels or splits are missing or cannot be used (exit 3)."""

    code = 3


class ModelError(NearkinError):
    """A run, a checkpoint or weights are missing, damaged or do not fit (exit 4)."""

    code = 4


class ExportError(NearkinError):
    """An exported model gives other results than nearkin, or cannot be written in this format (exit 5)."""

    code = 5


class DivergedError(NearkinError):
    """The loss is no longer finite, or the memory ran out (exit 6)."""

    code = 6


class ResumableError(NearkinError):
    """The work ended early, by no fault of its options or data, and goes on from what is saved (exit 75)."""

    code = 75


class ProcessDied(ResumableError):
    """Another process of the launch ended without an error of its own."""

    def __init__(self) -> None:
        super().__init__("Another process of this launch died; continue with --resume.")


class ProcessHangs(ResumableError):
    """Another process of the launch did not take part in a step."""

    def __init__(self, minutes: float) -> None:
        super().__init__(
            f"Another process of this launch did not answer for {minutes:g} minutes; look for a disk or a node that "
            "hangs, and continue with --resume."
        )


class Stopped(ResumableError):
    """A signal stopped the run; it is saved and can be resumed (exit 75)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get the memory that they asked for."""
    words = ("out of memory", "allocate memory", "not enough memory")
    said = isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    return said or isinstance(error, MemoryError)


CUTOFF = 0.75  # least similarity by difflib; at 0.6 --learning-rate resembles --drop-rate


def most_similar(name: str, known: Iterable[str], cutoff: float = CUTOFF) -> str:
    """The known name that is most similar to `name`, or an empty string when none is similar enough."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the most similar known name, or an empty string."""
    similar = most_similar(name, known)
    return f" Did you mean {similar}?" if similar else ""


def printable(text: str) -> str:
    """`text` on one line: control characters, bidirectional marks and undecodable bytes are escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


SHOWN = 5


def listed(names: Sequence[str]) -> str:
    """At most five names on one line, in the order given, and how many more there are."""
    text = ", ".join(printable(name) for name in names[:SHOWN])
    return f"{text} and {len(names) - SHOWN} more" if len(names) > SHOWN else text


def to_install(*extras: str) -> str:
    """The advice for packages that are missing."""
    options = " ".join(f"--extra {extra}" for extra in extras)
    return (
        f"in a copy of nearkin run: uv sync {options}; elsewhere: "
        f"pip install '/path/to/nearkin[{','.join(extras)}]'"
    )


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 image`, `2 images`, `1 class`, `2 classes`."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a message of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200])
