"""The process and its siblings: launch, signals, child processes, memory settings. Imports no torch."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from nearkin.errors import ConfigError, NearkinError, Stopped, counted, printable

# Signals that ask a run to stop. A terminal that is closed sends SIGHUP, schedulers send SIGUSR1 or SIGUSR2 some time
# before they kill, and the system SIGXCPU at a limit of processor time. Windows has only the first two.
STOP_SIGNALS = frozenset(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


MOST_WORKERS = 8  # processes that load images, by default
# Threads of torch beside a GPU: little is left to the processor, images are loaded by other processes, and a team of
# all cores waits for its slowest thread.
GPU_THREADS = 4


SHARE = "NEARKIN_CORES"  # cores for a process that shares the machine with others of its comparison


@contextmanager
def stop_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send the stop signals to `handler` within the block, then restore the earlier handlers. A SIGHUP that is ignored
    (`nohup`) stays so."""
    earlier: dict[int, Any] = {}
    # Python allows handlers in the main thread only; elsewhere (a notebook's worker) the caller decides.
    if threading.current_thread() is threading.main_thread():
        earlier = {
            number: signal.signal(number, handler)
            for number in STOP_SIGNALS
            if number != getattr(signal, "SIGHUP", None)
            or signal.getsignal(number) is not signal.SIG_IGN
        }
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


def interrupt(_: int, __: FrameType | None) -> None:
    """Handler for all that is not saved step by step: a stop signal ends it as Ctrl-C does."""
    raise KeyboardInterrupt


_received: list[tuple[int, float]] = []  # number and time of each stop signal


@contextmanager
def stop_signals_recorded() -> Iterator[None]:
    """Within the block a stop signal only sets a flag, which the loop reads between two steps.

    A second SIGINT ends the process at once.
    """
    _received.clear()
    try:
        with stop_handler(_record):
            yield
    finally:
        _received.clear()


def _record(number: int, _: FrameType | None) -> None:
    _received.append((number, time.monotonic()))
    if sum(each == signal.SIGINT for each, _ in _received) > 1:
        if "ipykernel" in sys.modules:  # a notebook would lose its variables
            raise KeyboardInterrupt
        leave_terminal("nearkin: stopped at once.")
        os._exit(Stopped.code)


def leave_terminal(text: str = "") -> None:
    """Before this process ends without any clean-up: show the cursor, which a bar hides, and `text` on stderr."""
    with suppress(OSError, ValueError, AttributeError):
        if sys.stderr.isatty():
            line = f"\n{text}\n" if text else ""
            os.write(sys.stderr.fileno(), f"\x1b[?25h{line}".encode())


def stop_requested(seconds: float = 0.0) -> bool:
    """Whether a stop signal has been recorded, at least `seconds` ago."""
    return bool(_received) and time.monotonic() - _received[0][1] >= seconds


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes started within the block inherit a mask that blocks the stop signals from their first instruction.

    A signal to the whole process group (timeout, scancel, systemctl stop) then reaches the main process alone, which
    decides what to do. Signals to this process are delivered at the end of the block. Does nothing on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        # Up to Python 3.12 its start unblocks SIGTERM and SIGINT in this thread.
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def exit_if_importing_main() -> None:
    """End a child process that is still importing the script of its parent.

    With the start methods spawn and forkserver each child imports the script. Without `if __name__ == "__main__":` it
    would train again; the parent reports the missing guard when its child ends (`nearkin.data.loader`).
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(1)


# Variables that launchers set besides torchrun and srun: of each process its rank, and how many there are.
OTHER_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
MOST_PORT = 65_535  # of TCP
SPECIAL_STEPS = 1 << 31  # Slurm's numbers of batch scripts and of interactive shells are above


class Launch(NamedTuple):
    """The processes that torchrun or srun started, and this one among them.

    per_node: processes on each node. address, port: of the TCP store that process 0 or torchrun's agent holds. name:
    of the launch, by which the processes of two of them on one port stay apart.
    """

    nodes: int = 1
    per_node: int = 1
    rank: int = 0
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    name: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node


def launched() -> Launch:
    """Read the environment that torchrun or srun set; one process without either. Raises ConfigError for what is no
    number there, for unequal numbers of processes on the nodes, and for ranks that are not numbered node after node."""
    launch = _read_launch(os.environ)
    if launch.rank % launch.per_node != launch.local_rank:
        raise ConfigError(
            f"Process {launch.rank} has number {launch.local_rank} of {launch.per_node} on its node, so the processes "
            "are not numbered node after node; start them with srun --distribution=block."
        )
    return launch


def _read_launch(env: Mapping[str, str]) -> Launch:
    if "TORCHELASTIC_RUN_ID" in env and "WORLD_SIZE" in env:
        world, local = _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE")
        address, port = env["MASTER_ADDR"], _port()
        rank, local_rank = _number("RANK"), _number("LOCAL_RANK")
        nodes = _number("GROUP_WORLD_SIZE", str(world // max(1, local)))
        if nodes * local != world:
            raise ConfigError(
                f"There are {world} processes, {local} of them on this node; start equally many on each node "
                "(--nproc-per-node)."
            )
        return Launch(nodes, local, rank, local_rank, address, port, env["TORCHELASTIC_RUN_ID"])
    if not _started_by_srun(env):
        return Launch()
    if (tasks := _number("SLURM_NTASKS", "1")) == 1:
        return Launch()
    nodes = _number("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))
    if tasks % nodes:
        raise ConfigError(
            f"There are {tasks} tasks on {nodes} nodes; start equally many on each node (--ntasks-per-node)."
        )
    # "gpu[007-009,12],cpu1" -> "gpu007"
    listed = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", listed).split(",")[0]
    # The same on all nodes, another in each job and in each step of a job.
    job, step = _number("SLURM_JOB_ID", "0"), _number("SLURM_STEP_ID")
    port = _port(15_000 + (job + 997 * step) % 10_000)
    rank, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
    address = env.get("MASTER_ADDR", first)
    return Launch(nodes, tasks // nodes, rank, local_rank, address, port, f"{job}.{step}")


def restarts() -> tuple[int, int]:
    """How often torchrun has started this launch again, and how often it may (`--max-restarts`). Raises ConfigError."""
    return _number("TORCHELASTIC_RESTART_COUNT", "0"), _number("TORCHELASTIC_MAX_RESTARTS", "0")


def _port(usual: int | None = None) -> int:
    port = _number("MASTER_PORT", "" if usual is None else str(usual))
    if port > MOST_PORT:
        raise ConfigError(f"The environment variable MASTER_PORT is {port}, above {MOST_PORT}.")
    return port


def _number(name: str, otherwise: str = "") -> int:
    """A variable of the environment that a launcher sets, from 0. Raises ConfigError."""
    value = os.environ.get(name, otherwise)
    if not value.isdecimal():
        raise ConfigError(
            f"The environment variable {name} is {printable(value)!r}, but must be a whole number."
        )
    return int(value)


def refuse_other_launchers() -> None:
    """Raises ConfigError in one of several processes that neither torchrun nor srun started: each would train for
    itself."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or launched().world_size > 1:
        return
    for rank, size in OTHER_LAUNCHERS:
        if size == "PMI_SIZE" and "SLURM_JOB_ID" in env:
            continue  # an interactive shell of Slurm may have it
        number = env.get(size, "")
        if rank in env and number.isdecimal() and int(number) > 1:
            raise ConfigError(
                f"{size} says that this is one of {number} processes, but they were not started by torchrun or srun, "
                f"and each would train for itself; start them with torchrun, or unset {rank} and {size}."
            )


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """Whether this process is a task of srun: a batch script and the shell of an allocation have the number of tasks as
    well, but no step, or one of the last numbers. So has `srun --pty bash`, in a terminal; a task of srun that is
    started there has its job name, too, but no terminal."""
    step = env.get("SLURM_STEP_ID", "")
    task = "SLURM_PROCID" in env and step.isdecimal() and int(step) < SPECIAL_STEPS
    return task and not (env.get("SLURM_JOB_NAME") in ("bash", "interactive") and _in_terminal())


def _in_terminal() -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return sys.stdin.isatty()
    return False


def cores() -> int:
    """CPU cores for this process: its share of those that the processes of its node may use, at least 1.

    With `srun --cpus-per-task` the scheduler has already divided them among its tasks, each of which may be a torchrun.
    A run of a comparison gets its share in SHARE.
    """
    share = os.environ.get(SHARE)
    if share is not None and share.isdecimal():
        return max(1, int(share))
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given is not None and "SLURM_PROCID" in os.environ:
        sharing = launched().per_node if "TORCHELASTIC_RUN_ID" in os.environ else 1
        return max(1, int(given) // sharing)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if limit := container_limit("cpu.max"):  # microseconds of all cores together, in a period
        usable = min(usable or 1, limit[0] // limit[1])
    return max(1, (usable or 1) // launched().per_node)


# A container sees its own group here (cgroup v2), others the root.
CONTAINER = Path("/sys/fs/cgroup")


def container_limit(name: str) -> list[int]:
    """The numbers in a file of limits of the container, such as cpu.max; empty without a limit."""
    with suppress(OSError, ValueError):
        return [int(word) for word in (CONTAINER / name).read_text().split()]  # or "max"
    return []


T = TypeVar("T")


def agreed(exchange: Callable[[Any], list[Any]], work: Callable[[], T]) -> list[T]:
    """The result of `work` of each process, on all of them. exchange: collects what each of them holds. Raises the
    first NearkinError on all of them."""
    result: T | None = None
    problem: NearkinError | None = None
    try:
        result = work()
    except NearkinError as error:
        problem = error
    outcomes = exchange((result, problem))
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def gpu_of(launch: Launch, visible: int) -> int:
    """The number of this process's GPU, of those that it sees. Slurm may show each task a single one, its own. Raises
    ConfigError."""
    if launch.local_rank < visible:
        return launch.local_rank
    if visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    raise ConfigError(
        f"There are {launch.per_node} processes on this node, which sees {counted(visible, 'GPU')}; start one process "
        "for each GPU."
    )


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
