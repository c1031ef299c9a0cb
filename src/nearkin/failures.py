"""An error on one process ends all processes of a launch, with one message."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from threading import Event, Thread

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from nearkin.errors import NearkinError, Stopped
from nearkin.process import Launch, launched

# A process that hangs in a step is noticed in minutes; gloo's own default is half an hour.
STEP_TIMEOUT = timedelta(minutes=5)


class Failures:
    """Tells all processes of a launch that one of them has failed.

    A thread of each process reads a key of the launch's TCP store once a second. When another process has failed, it
    ends its own process with the exit code of the other: the main thread may wait in a collective for days.

    callback: called with message and exit code before this process ends by an error, its own or another's.
    """

    POLL = 1.0  # seconds
    GRACE = (
        5.0  # seconds in which this process may end by an error of its own, such as the same one
    )
    LOST = 20.0  # seconds without the store until the process that holds it counts as dead
    runs = 0  # a second run in the same processes has keys of its own

    def __init__(self, launch: Launch) -> None:
        self.callback: Callable[[str, int], None] | None = None
        self._launch = launch
        self._stopped = Event()
        self._prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{Failures.runs}"
        Failures.runs += 1
        if launch.world_size > 1:
            self._store = PrefixStore(self._prefix, _store(launch))

    def start_group(self, device: torch.device) -> None:
        """Start torch's process group, with a connection of its own, since it blocks its connection while it waits."""
        if dist.is_initialized():  # of an earlier run that failed
            dist.destroy_process_group()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"{self._prefix}/group", _connect(self._launch, holds=False)),
            rank=self._launch.rank,
            world_size=self._launch.world_size,
            timeout=STEP_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )

    def watch(self) -> None:
        """Start the thread."""
        Thread(target=self._watch, daemon=True).start()

    def stop_watching(self) -> None:
        """Before the process that holds the store may end."""
        self._stopped.set()

    def report(self, error: BaseException, *, own: bool = True) -> None:
        """Tell the other processes, and mark `error` as `reported_elsewhere` unless it is the first one.

        own: whether the error may have begun here; if not and another process has failed, this one ends like it. The
        process that holds the store waits until all others have read it, at most a minute.
        """
        self.stop_watching()
        message, code = _describe(error)
        if self._launch.world_size > 1:
            first = self._first(message, code)
            error.reported_elsewhere = not first  # type: ignore[attr-defined]
            if not first and not (own and isinstance(error, NearkinError | KeyboardInterrupt)):
                self._exit(*json.loads(self._store.get("failure")))
        if self.callback is not None:
            self.callback(message, code)
        if self._launch.world_size > 1 and _holds_store(self._launch):
            self._wait_for_others()

    def _first(self, message: str, code: int) -> bool:
        try:
            first = self._store.add("failed", 1) == 1
            if first:
                self._store.set("failure", json.dumps([message, code]))
            self._store.add("ended", 1)
        except dist.DistError:  # the process that holds it has died
            return True
        return first

    def _wait_for_others(self) -> None:
        for _ in range(60):
            if self._store.add("ended", 0) >= self._launch.world_size:
                return
            time.sleep(self.POLL)

    def _watch(self) -> None:
        while not self._stopped.wait(self.POLL):
            try:
                if not self._store.check(["failure"]):
                    continue
                message, code = json.loads(self._store.get("failure"))
                if self._stopped.wait(self.GRACE):
                    return
                self._store.add("ended", 1)
            except dist.DistError:
                if self._stopped.wait(self.LOST):
                    return
                message, code = _describe(ProcessDied())
                if self._launch.rank == 1:  # once is enough
                    sys.stderr.write(f"nearkin: stopped: {message}\n")
            self._exit(message, code)

    def _exit(self, message: str, code: int) -> None:
        try:
            if self.callback is not None:
                self.callback(message, code)
            for child in multiprocessing.active_children():
                child.kill()
        finally:
            os._exit(code)


class ProcessDied(NearkinError):
    """Another process of the launch ended without an error of its own (exit 75)."""

    code = 75

    def __init__(self) -> None:
        super().__init__("Another process of this launch died; continue with --resume.")


def named(error: BaseException) -> BaseException:
    """ProcessDied for torch's many ways to say it."""
    texts = ("closed by peer", "reset by peer", "remote process exited")
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return ProcessDied() if lost or isinstance(error, dist.DistError) else error


def _describe(error: BaseException) -> tuple[str, int]:
    """One line and the exit code of the command line."""
    if isinstance(error, NearkinError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Stopped.code
    return f"{type(error).__name__}: {error}", 1


def report_failure(error: BaseException) -> None:
    """Tell the other processes of a launch of an error before the start of the run; see `Failures.report`."""
    launch = launched()
    if launch.world_size > 1 and Failures.runs == 0:
        Failures(launch).report(error)


def _holds_store(launch: Launch) -> bool:
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@cache
def _store(launch: Launch) -> TCPStore:
    """One for the life of the process: others may still read it when a run has ended."""
    return _connect(launch, holds=_holds_store(launch))


def _connect(launch: Launch, *, holds: bool) -> TCPStore:
    return TCPStore(
        launch.address, launch.port, is_master=holds, timeout=STEP_TIMEOUT, wait_for_workers=False
    )
