"""Whole processes: how long until help is there, and until the first optimiser step is taken."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import Call, Row, Table, alternate, fastest, ratio
from nearkin.cli import VERBS

RUNS = 15


def process(*words: str) -> None:
    """`python -m WORDS` from start to exit, with one thread; a process that fails is an error.

    Bytecode may be cached: the round that does not count fills it.
    """
    hidden = {"PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(
        [sys.executable, "-m", *words],
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
    )


def _helping(*words: str) -> Call:
    return lambda: process("nearkin", *words, "--help")


def _first_step(place: Path) -> Callable[[], None]:
    """Each call in a run folder of its own."""
    numbers = itertools.count()
    return lambda: process("benchmarks.first_step", "nearkin", str(place / str(next(numbers))))


def table() -> Table:
    with tempfile.TemporaryDirectory() as place:
        calls: dict[str, Call] = {
            "help": _helping(),
            **{verb: _helping(verb) for verb in VERBS},
            "with torch": _helping("train", "--objective", "cone"),
            "step": _first_step(Path(place)),
            "plain": lambda: process("benchmarks.first_step", "plain"),
        }
        seconds = alternate(calls, RUNS)
    plain = "a plain script with the same libraries"
    rows: list[Row] = [
        fastest(seconds, "help", "nearkin --help", 0.3),
        *(fastest(seconds, verb, f"nearkin {verb} --help", 1.2) for verb in VERBS),
        fastest(seconds, "with torch", "nearkin train --objective cone --help (loads torch)"),
        fastest(seconds, "step", "nearkin train, to the end of its first step"),
        fastest(seconds, "plain", f"{plain}, the same"),
        ratio(seconds, "step", "plain", f"first step against {plain}", 1.2),
    ]
    setting = (
        "fresh processes from start to exit, one thread, bytecode cached; digits with the default "
        "options; both leave right after the step"
    )
    return Table("Start-up", setting, rows)
