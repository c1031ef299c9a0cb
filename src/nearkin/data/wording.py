"""How names from files and folders are shown to a person."""

from __future__ import annotations

from collections.abc import Sequence

from nearkin.errors import printable

SHOWN = 5


def listed(names: Sequence[str]) -> str:
    """At most five names on one line, in the order given, and how many more there are."""
    text = ", ".join(printable(name) for name in names[:SHOWN])
    return f"{text} and {len(names) - SHOWN} more" if len(names) > SHOWN else text


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 image`, `2 images`, `1 class`, `2 classes`."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
