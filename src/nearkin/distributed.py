"""Processes of a run: collectives, mixed precision, stop flags, failures."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from datetime import timedelta
from functools import cache
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from nearkin.device import Precision
from nearkin.errors import (
    ConfigError,
    NearkinError,
    ProcessDied,
    ProcessHangs,
    Stopped,
    first_line,
    printable,
)
from nearkin.process import GPU_THREADS, Launch, agreed, exit_if_importing_main, gpu_of, launched
from nearkin.types import Outputs

if TYPE_CHECKING:
    from torch.optim import Optimizer


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every rank, rank after rank, with gradient.

    x: `[n, ...]`, the same n and dtype on all W ranks -> `[W * n, ...]`. The gradient of x is the sum over
    ranks of the gradients of its rows: with the same loss L on every rank that is W dL/dx, which the mean
    over ranks that DDP takes of parameter gradients turns into dL/dx. Without a process group, x itself.
    """
    if not dist.is_initialized():
        return x
    gathered: Tensor = _GatherRows.apply(x)
    return gathered


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, without gradient. Without a process group, x itself."""
    if not dist.is_initialized():
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        gathered = x.new_empty((dist.get_world_size() * ctx.rows, *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return sum_over_ranks(grad)[first : first + ctx.rows]


T = TypeVar("T")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LONG_TIMEOUT = timedelta(days=2)  # for waiting while one process scans or saves
# A process that hangs in a step is noticed in minutes; gloo's own default is half an hour.
STEP_TIMEOUT = timedelta(minutes=5)
STARTING = 10.0  # seconds until the first node must have its name and the port, which an earlier run may still hold


class Runtime:
    """The processes, the device and the precision of one run.

    A context manager: an exception that leaves the block on any process ends all processes of the run within seconds.
    Afterwards torch has the threads and the random numbers of the caller again.
    """

    def __init__(self, *, device: str, precision: Precision) -> None:
        exit_if_importing_main()
        launch = launched()
        self.rank, self.local_rank = launch.rank, launch.local_rank
        self.world_size = launch.world_size
        self.is_main = launch.rank == 0
        self.device = torch.device(device)
        self._threads, self._random = torch.get_num_threads(), torch.get_rng_state()
        if device == "cuda":
            self.device = torch.device("cuda", gpu_of(launch, torch.cuda.device_count()))
            torch.cuda.set_device(self.device)
            torch.set_num_threads(min(GPU_THREADS, self._threads))
            self._random_there = torch.cuda.get_rng_state(self.device)
        self._set_precision(precision)
        self.failures = Failures(launch)
        if self.world_size > 1:
            self.failures.start(self.device)
            group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
            self._patient_group = cast("dist.ProcessGroup", group)

    def _set_precision(self, precision: Precision) -> None:
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def at(self, precision: Precision) -> Runtime:
        """The same processes and device with another precision."""
        if precision == self.precision:
            return self
        other = copy(self)
        other._set_precision(precision)
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.close()
            return
        cause = named(error)
        self.failures.report(cause, own=cause is error)
        with suppress(RuntimeError):  # of a GPU that has failed
            self._give_back()
        if cause is not error:
            raise cause from error

    def close(self) -> None:
        """Leave the process group, so that a second run in this process can start its own."""
        self.failures.stop_watching()
        if self.world_size > 1:
            dist.destroy_process_group()
        self._give_back()

    def _give_back(self) -> None:
        """Of the process that called."""
        torch.set_num_threads(self._threads)
        torch.set_rng_state(self._random)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random_there, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and buffers: float32; float64 in proofs."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def place(self, module: nn.Module) -> None:
        """Move a module to the device and the dtype of the run."""
        module.to(self.device, self.dtype)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network under DistributedDataParallel; with one process, itself."""
        if self.world_size == 1:
            return network
        with warnings.catch_warnings():
            # torch 2.15 renames the option to one that earlier versions do not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            # Our statistics are the same on every process already, so DDP has no buffers to send.
            return DistributedDataParallel(network, broadcast_buffers=False)

    def forward(self, network: nn.Module, images: Tensor) -> Outputs:
        """The network's outputs under autocast, converted to the dtype of the run."""
        with self.autocast():
            outputs = network(images)
        return Outputs(*(None if each is None else each.to(self.dtype) for each in outputs))  # type: ignore[arg-type]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for bf16 and fp16; nothing for the others."""
        dtype = _AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def accumulating(self, network: nn.Module, unfinished: bool) -> AbstractContextManager[Any]:
        """Keeps gradients on this process while `unfinished` parts of the batch remain."""
        if unfinished and isinstance(network, DistributedDataParallel):
            return network.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Back-propagate `loss`, scaled for fp16."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, max_norm: float | None) -> None:
        """Clip the gradient to `max_norm` if given, take the optimiser's step and clear the gradient.

        A gradient that is not finite raises nothing: the loop reports the loss.
        """
        self.scaler.unscale_(optimizer)
        if max_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def gather(self, rows: Tensor, views: int = 1) -> Tensor:
        """`[V * b, ...]` of each process -> `[V * B, ...]`, view after view; the backward sums over processes."""
        if self.world_size == 1:
            return rows
        gathered = gather_rows(rows)
        if views == 1:
            return gathered
        parts = gathered.view(self.world_size, views, -1, *rows.shape[1:])
        return parts.transpose(0, 1).flatten(0, 2)

    def share(self, value: T) -> T:
        """The value of process 0, on every process. Picklable objects of our own only."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._patient_group)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes, on every process. Some may come hours later than others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient_group)
        return values

    def once_per_node(self, work: Callable[[], T]) -> T:
        """The result of `work` on the first process of each node, on all processes of that node. Raises the first
        NearkinError of any on all of them."""
        mine: T | None = None

        def on_first() -> T | None:
            nonlocal mine
            mine = work() if self.local_rank == 0 else None
            return mine

        results = agreed(self.collect, on_first)
        # Not its copy: a cache folder is deleted with the object that made it.
        found = mine if self.local_rank == 0 else results[self.rank - self.local_rank]
        return cast("T", found)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.collect(None)


class Flags:
    """Stop and NaN flags, all-reduced and read one step later, so that no step waits for them.

    On a GPU they are reduced and copied on a stream of their own: reading those of the last step does not wait for
    this one.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._single = runtime.world_size == 1
        self._device = runtime.device
        self._stream = torch.cuda.Stream() if runtime.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._sent: tuple[Tensor, Callable[[], Any] | None] | None = None

    def post(self, stop: bool, bad: Tensor) -> None:
        """Send whether this process should stop and whether its loss is not finite (`[]` bool, on the device)."""
        stopping = torch.full((), stop, dtype=torch.bool, device=self._device)
        flags = torch.stack([stopping, bad]).to(torch.int32)
        if self._stream is not None:
            self._sent = self._to_host(flags, self._stream)
        elif self._single:
            self._sent = flags, None
        else:
            self._sent = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True).wait

    def read(self) -> tuple[bool, bool]:
        """(stop, bad) of the last post, of any process; (False, False) before the first."""
        if self._sent is None:
            return False, False
        flags, wait = self._sent
        if wait is not None:
            wait()
        self._sent = None
        stop, bad = flags.tolist()
        return bool(stop), bool(bad)

    def _to_host(
        self, flags: Tensor, stream: torch.cuda.Stream
    ) -> tuple[Tensor, Callable[[], Any]]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            flags.record_stream(stream)
            if not self._single:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            host = torch.empty(2, dtype=torch.int32, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(stream)
        return host, arrival.synchronize


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
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        self._prefix = f"{launch.name}/{restart}/{Failures.runs}"
        Failures.runs += 1
        if launch.world_size > 1:
            self._store = PrefixStore(self._prefix, _store(launch))

    def start(self, device: torch.device) -> None:
        """Start the thread and torch's process group. A group that waits blocks its connection, so it has its own."""
        Thread(target=self._watch, daemon=True).start()
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


def named(error: BaseException) -> BaseException:
    """ProcessDied or ProcessHangs in place of the errors that torch raises when another process is gone or does not
    answer; other errors unchanged."""
    if isinstance(error, RuntimeError) and "Timed out waiting" in str(error):
        return ProcessHangs(STEP_TIMEOUT.total_seconds() / 60)
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
        with suppress(ConfigError):  # the others cannot be reached; this process says its own error
            Failures(launch).report(error)


def _holds_store(launch: Launch) -> bool:
    return launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@cache
def _store(launch: Launch) -> TCPStore:
    """One for the life of the process: others may still read it when a run has ended."""
    return _connect(launch, holds=_holds_store(launch))


def _connect(launch: Launch, *, holds: bool) -> TCPStore:
    """Raises ConfigError where the store cannot be held or reached."""
    end = time.monotonic() + STARTING
    while True:
        try:
            # torch would ask for the name for STEP_TIMEOUT, with a warning each time.
            socket.getaddrinfo(launch.address, None)
            return TCPStore(launch.address, launch.port, is_master=holds, timeout=STEP_TIMEOUT)
        except (OSError, UnicodeError, dist.DistNetworkError) as error:
            if time.monotonic() > end:
                reason = first_line(error).rpartition("message: ")[2].rstrip(".")
                raise ConfigError(
                    f"The processes cannot meet at MASTER_ADDR {printable(launch.address)}, MASTER_PORT {launch.port} "
                    f"({reason}); give an address of the first node that all nodes know, and a port that is free there."
                ) from error
        time.sleep(1)
