"""One run of a comparison, in a process of its own: `python -m nearkin.comparison.run FOLDER NAME [THREADS WORKERS]`.

FOLDER/NAME.yaml holds the options, FOLDER/NAME is the run folder. What was begun goes on; what is finished stays. The
same process serves one machine, a SLURM array and a Ray cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nearkin.errors import NearkinError, Stopped, printable
from nearkin.files import write_atomic
from nearkin.process import interrupt, keep_freed_memory, stop_handler

PARENT = "NEARKIN_COMPARE_PARENT"  # process that ends this one when it dies
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
PATIENCE = 120.0  # seconds for an earlier process of the same run to end
LOOK = 1.0  # seconds between two looks whether it has


def main(words: Sequence[str]) -> int:
    """Run, and return the exit code. What goes wrong is written to FOLDER/NAME.error as one sentence."""
    folder, name = Path(words[0]), words[1]
    machine = dict(zip(("threads", "workers"), words[2:], strict=False))
    failure = folder / f"{name}.error"
    failure.unlink(missing_ok=True)
    _end_with_parent()
    keep_freed_memory()
    try:
        with stop_handler(interrupt):
            _run(folder, name, machine)
    except KeyboardInterrupt:
        return Stopped.code
    except Stopped:
        return Stopped.code
    except Exception as error:
        known = isinstance(error, NearkinError)
        text = str(error) if known else f"{type(error).__name__}: {error} (a bug; please report it)"
        write_atomic(failure, f"{printable(text)}\n".encode())
        if not known and os.environ.get("NEARKIN_DEBUG"):
            raise
        return error.code if isinstance(error, NearkinError) else 1
    return 0


def _run(folder: Path, name: str, machine: dict[str, Any]) -> None:
    from nearkin.config import read_yaml
    from nearkin.training import run_folder
    from nearkin.training.api import continue_run, start_run

    run = folder / name
    _wait_for(run)
    if run_folder.stored_state(run) == "finished":
        return
    options = read_yaml(folder / f"{name}.yaml")
    if run_folder.has_checkpoint(run):
        where = {"data": options["data"]} if "data" in options else {}
        continue_run(run, where, quiet=True, report=False)
    else:
        if (
            run.exists()
        ):  # it was killed before it saved anything, or another process has just begun
            with run_folder.locked(run):
                shutil.rmtree(run)
        start_run(machine | options | {"out": run}, quiet=True, report=False)
    write_atomic(folder / f"{name}.json", json.dumps({"memory": _peak()}).encode())


def _wait_for(run: Path) -> None:
    """Until an earlier process of the same run has ended: one whose parent was killed saves first. Raises Stopped."""
    from nearkin.training import run_folder

    limit = time.monotonic() + PATIENCE
    while run.exists():
        try:
            with run_folder.locked(run):
                return
        except run_folder.Busy as error:
            if time.monotonic() > limit:
                raise Stopped(str(error)) from None
            time.sleep(LOOK)


def _peak() -> int:
    """Bytes that this process has used at most: of the GPU where there is one, else of the memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, StopIteration, ValueError):  # not Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)


def _end_with_parent() -> None:
    """Let Linux stop this process (it saves) when the one that started it dies, even if that one is killed."""
    parent = os.environ.get(PARENT)
    if parent is None or sys.platform != "linux":
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent:  # it died before
        os._exit(Stopped.code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
