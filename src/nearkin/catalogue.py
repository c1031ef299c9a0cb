"""Objectives by name."""

from __future__ import annotations

from collections.abc import Iterable


def check_objective(name: str, options: Iterable[str] = ()) -> None:  # noqa: ARG001
    """Raises ConfigError for an unknown objective."""
    from nearkin.objectives import get

    get(name)
