"""Whole processes: how long until there is an answer, until the first optimiser step and until one prediction."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import Call, Row, Table, alternate, fastest, ratio
from nearkin.cli import VERBS

RUNS = 15
SOON = 0.5  # seconds of an answer that needs no torch
# What is wrong, and the exit code that says so.
MISTAKES = {
    "nearkin train --learning-rate 1 (no such option)": (("train", "--learning-rate", "1"), 2),
    "nearkin train --objective kone (no such objective)": (("train", "--objective", "kone"), 2),
    "nearkin train /nowhere": (("train", "/nowhere"), 3),
    "nearkin predict /nowhere x.jpg": (("predict", "/nowhere", "x.jpg"), 4),
}


def process(*words: str, code: int = 0) -> None:
    """`python -m WORDS` from start to exit, with one thread; another exit code than `code` is an error.

    Bytecode may be cached: the round that does not count fills it.
    """
    hidden = {"PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=kept | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode != code:
        raise subprocess.CalledProcessError(done.returncode, done.args, stderr=done.stderr)


def processor_seconds() -> float:
    """User and system time of all processes that have ended: other work on the machine counts less than by a clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _first_step(place: Path) -> Callable[[], None]:
    """Each call in a run folder of its own."""
    numbers = itertools.count()
    return lambda: process("benchmarks.first_step", "train", str(place / str(next(numbers))))


def table() -> Table:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        process("benchmarks.first_step", "prepare", name)
        files = (str(place / "run"), str(place / "image.png"))
        calls: dict[str, Call] = {
            "nearkin --help": lambda: process("nearkin", "--help"),
            **{f"nearkin {verb} --help": _helping(verb) for verb in VERBS},
            **{what: _mistaken(*given) for what, given in MISTAKES.items()},
            "train": _first_step(place),
            "plain train": lambda: process("benchmarks.first_step", "plain_train"),
            "predict": lambda: process("nearkin", "predict", *files),
            "plain predict": lambda: process("benchmarks.first_step", "plain_predict", *files),
        }
        seconds = alternate(calls, RUNS, clock=processor_seconds)
    answers = [name for name in calls if name.startswith("nearkin ")]
    rows: list[Row] = [
        *(fastest(seconds, name, name, SOON) for name in answers),
        ratio(seconds, "train", "plain train", "train to the end of its first step", 1.15),
        ratio(seconds, "predict", "plain predict", "predict one image", 1.15),
    ]
    setting = (
        "user and system seconds of fresh processes from start to exit, one thread, bytecode cached; peers: "
        "`import torch, timm` and one step or prediction of the same network"
    )
    return Table("Start-up", setting, rows)


def _helping(verb: str) -> Call:
    return lambda: process("nearkin", verb, "--help")


def _mistaken(words: tuple[str, ...], code: int) -> Call:
    return lambda: process("nearkin", *words, code=code)
