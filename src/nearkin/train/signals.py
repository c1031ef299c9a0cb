"""Signals that ask a run to stop. The handler only sets a flag; the loop saves between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from nearkin.errors import Stopped

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopSignals:
    """Within the `with` block SIGTERM, SIGINT and SIGUSR1 ask to stop; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere (a notebook's worker) the caller decides.
        if threading.current_thread() is threading.main_thread():
            for name in ASKING:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(Stopped.code)
