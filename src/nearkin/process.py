"""Signals, and memory settings of the process. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from nearkin.errors import Stopped

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block the asking signals go to `handler`; afterwards to whoever had them before."""
    before: dict[int, Any] = {}
    # Python allows handlers in the main thread only; elsewhere (a notebook's worker) the caller decides.
    if threading.current_thread() is threading.main_thread():
        for name in ASKING:
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(_: int, __: FrameType | None) -> None:
    """For the time before the first step, when there is nothing to save yet."""
    raise KeyboardInterrupt


class StopSignals:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked to stop; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0

    def ask(self, number: int, _: FrameType | None) -> None:
        """The handler: it only sets a flag, which the loop reads between two steps."""
        self.asked = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(Stopped.code)


# Of glibc's malloc.h; torch asks malloc for every tensor on a CPU.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next step. For the command line only: it changes the whole process.

    glibc maps large tensors one by one and unmaps them when they are freed, so that every step pays for fresh
    pages (measured: docs/performance.md). Does nothing where there is no mallopt (musl, macOS, Windows).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
