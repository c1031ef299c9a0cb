"""Batches of images, made by worker processes. A batch is a function of its keys, whichever worker makes it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing import get_start_method, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Event as EventType
from multiprocessing.util import get_temp_dir
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing import Event as SharedEvent
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nearkin.data.dataset import Split
from nearkin.data.decode import BadImage
from nearkin.data.images import ImageSource
from nearkin.data.sampling import SampleKey, sample_seed
from nearkin.data.transforms import Pipeline
from nearkin.errors import ConfigError, DataError, NearkinError, ResumableError, Stopped
from nearkin.process import exit_if_importing_main, stop_requested, stop_signals_blocked
from nearkin.types import Batch

POLL = 1.0  # seconds between two looks at signals and workers while a batch is awaited
PATIENCE = 20.0  # seconds from a stop signal until a missing batch is given up; Slurm kills at 30
OVERDUE = 600.0  # seconds without a batch after which the workers count as hung
SPARE = 4  # files that a loader keeps open for a run that has to save itself because it can open no more
PREFETCH = 2  # batches that a worker makes ahead
# The second is what Python says where the system left a file descriptor out of a message.
TOO_MANY_FILES = ("Too many open files", "received 0 items of ancdata")
SHARED_MEMORY = Path("/dev/shm")
# Bytes of decoded images in a chunk, whose random numbers are drawn first: between the pixel operations of two images
# a draw takes up to three times as long.
TOGETHER = 1 << 23

T = TypeVar("T")
Views = Callable[[ImageSource, Sequence[SampleKey]], list[Tensor]]


class WorkersDied(ResumableError):
    """A process that loads images ended early."""


def train_loader(
    split: Split,
    transform: Pipeline,
    order: Iterable[list[SampleKey]],
    *,
    views: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
    patience: float = 0.0,
) -> Iterator[Batch]:
    """One `Batch` for each list of keys in `order`: images uint8 `[views, b, C, H, W]`, labels and index `[b]`.

    Each view is made with a generator that `sample_seed` gives, so that 0, 1 or 4 workers make the same batches.
    index: the row in the split.

    patience: seconds from a stop signal until `Stopped` is raised if the workers send no batch; other processes may
    be in the middle of a step.

    Raises DataError when an image can no longer be read, WorkersDied when a worker ends early.
    """
    make = partial(_train_views, transform, views, seed)
    return in_processes(_Batches(split, make), order, workers, pin_memory, patience)


def eval_loader(
    split: Split,
    views: Callable[[Tensor], tuple[Tensor, ...]],
    rows: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of the views of each of `rows`, in their order, none padded and none dropped: the last is smaller.

    views: a decoded image -> its views, the same number for every image. Raises as `train_loader`.
    """
    keys = [SampleKey(row, 0, 0) for row in rows]
    order = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    make = partial(_eval_views, views)
    return in_processes(_Batches(split, make), order, workers, pin_memory, PATIENCE)


class _Batches(Dataset[Batch | DataError]):
    """Makes whole batches. Returns a DataError as a value, since torch would lose its text and class.

    views: the images of some keys -> all first views, then all second views, and so on.
    """

    def __init__(self, split: Split, views: Views) -> None:
        self.split, self.views = split, views

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch | DataError:
        try:
            made = self.views(self.split.images, keys)
        except BadImage as error:
            return error.by_now()
        rows = [key.row for key in keys]
        images = stacked(made).view(-1, len(keys), *made[0].shape)
        return Batch(images, torch.from_numpy(self.split.labels[rows]), torch.tensor(rows))


def stacked(images: Sequence[Tensor]) -> Tensor:
    """`[n, C, H, W]` in the memory format of the images: decoders and resizing leave a pixel's colours side by side.

    Another format would be converted twice, which takes as long as the rest of loading from a cache.
    """
    if images[0].shape[0] > 1 and images[0].stride(0) == 1:
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))


def _train_views(
    transform: Pipeline, count: int, seed: int, images: ImageSource, keys: Sequence[SampleKey]
) -> list[Tensor]:
    views: list[list[Tensor]] = [[] for _ in range(count)]
    decoded: list[Tensor] = []
    for end, key in enumerate(keys, 1):
        decoded.append(images.read(key.row))
        if end < len(keys) and sum(image.nbytes for image in decoded) < TOGETHER:
            continue
        for view, made in enumerate(views):
            seeds = [
                sample_seed(seed, key.epoch, key.row, key.occurrence, view)
                for key in keys[end - len(decoded) : end]
            ]
            made += transform.of_each(decoded, seeds)
        decoded = []
    return list(chain(*views))


def _eval_views(
    make: Callable[[Tensor], tuple[Tensor, ...]], images: ImageSource, keys: Sequence[SampleKey]
) -> list[Tensor]:
    made = [make(images.read(key.row)) for key in keys]
    return list(chain(*zip(*made, strict=True)))


def fitting_workers(workers: int, batch_bytes: int) -> int:
    """How many of `workers` have room for their batches in shared memory; all of them where there is no /dev/shm.

    batch_bytes: of one batch of each loader that is open at the same time, over all processes of the machine.
    """
    if not SHARED_MEMORY.is_dir():
        return workers
    batches = shutil.disk_usage(SHARED_MEMORY).free // max(1, batch_bytes)
    return max(0, min(workers, (batches - 1) // PREFETCH))  # one more batch is in use


def in_processes(
    made: Dataset[T | NearkinError],
    order: Iterable[Sequence[Any]],
    workers: int,
    pin_memory: bool = False,
    patience: float = 0.0,
    ahead: int = PREFETCH,
) -> Iterator[T]:
    """What the `__getitems__` of `made` gives for each of `order`, in that order; an error that it gives is raised.
    ahead: of them that each worker makes before they are wanted.

    Raises as `train_loader`.
    """
    started = SharedEvent() if workers else None
    loader: DataLoader[T | NearkinError] = DataLoader(
        made,
        batch_sampler=order,  # type: ignore[arg-type]  # any iterable of keys will do
        num_workers=workers,
        collate_fn=_share,  # of whole batches
        worker_init_fn=partial(_start_worker, started) if started else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise each loader would draw from the global state
        timeout=POLL if workers else 0,
        prefetch_factor=ahead if workers else None,
    )
    with _deaths_explained(started), _spare_files():
        batches = _start(loader) if workers else iter(loader)
        with _Watch(getattr(batches, "_workers", []), patience) as watch:
            while (batch := _next(batches, watch)) is not None:
                if isinstance(batch, NearkinError):
                    raise batch
                yield batch


def _start(loader: DataLoader[T]) -> Iterator[T]:
    """Start the workers.

    torch's first loader sets a SIGCHLD handler that raises an error wherever the main process is, in the middle of a
    step too. Without it `next` reports a death within `POLL` seconds, between two steps, where the run can be saved.
    """
    exit_if_importing_main()
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < 2**20:  # semaphores, too
        raise _no_room(loader.num_workers)
    # Workers make their sockets there, and this process removes the folder at its end: they are killed, not ended.
    get_temp_dir()
    in_main_thread = current_thread() is main_thread() and hasattr(signal, "SIGCHLD")
    handler = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    with stop_signals_blocked():
        batches = iter(loader)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
    return batches


class _Watch:
    """Kills the workers of a loader at its end, and when the main process has waited too long for a batch.

    A worker that is stopped or hangs may have announced a batch. torch then waits for the batch's memory, without a
    limit and without a look at signals, until that worker ends. Such a worker does not obey SIGTERM either, with which
    torch and Python end workers, and the process would wait for it at its exit. Killing loses nothing, since workers
    only read.
    """

    def __init__(self, workers: Sequence[BaseProcess], patience: float) -> None:
        self._workers, self._patience = workers, patience
        self._ended = Event()
        self.waiting = False
        self.looks = 0  # while waiting; no clock, which goes on while the whole run is suspended

    def __enter__(self) -> _Watch:
        if self._workers:
            Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._kill()

    def reason(self) -> NearkinError | None:
        """Why the main process waits no longer."""
        if self.looks > 1 and stop_requested(self._patience):
            return Stopped("Stopped on request while waiting for images; continue with --resume.")
        if self.looks * POLL < OVERDUE:
            return None
        return WorkersDied(
            f"No images have come for {OVERDUE / 60:.0f} minutes: a process that loads them hangs or is stopped; see "
            "whether the disk of the images answers, and continue with --resume."
        )

    def _look(self) -> None:
        while not self._ended.wait(POLL):
            self.looks += self.waiting
            if self.waiting and self.reason():
                self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()


def _next(batches: Iterator[T], watch: _Watch) -> T | None:
    watch.waiting, watch.looks = True, 0
    while True:
        try:
            batch = next(batches, None)
            watch.waiting = False
            return batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            if reason := watch.reason():
                raise reason from error
            if "DataLoader timed out" not in str(error):  # torch has no class for it
                raise
            pinning = getattr(batches, "_pin_memory_thread", None)
            # torch looks at that thread only where it waits without a limit.
            if pinning is not None and not pinning.is_alive():
                raise WorkersDied(
                    "The thread that takes images for the GPU ended early; its error is above. Give the command "
                    "again, or continue a run with --resume."
                ) from error


def _share(made: Any) -> Any:
    """In a worker, move a batch to shared memory.

    Otherwise torch does it in a background thread of the worker, where an error is printed and lost, and the main
    process waits for ever.
    """
    worker = get_worker_info()
    if worker is None or not isinstance(made, Batch):
        return made
    try:
        return Batch(*(tensor.share_memory_() for tensor in made))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return _no_room(worker.num_workers)


def _no_room(workers: int) -> WorkersDied:
    return WorkersDied(
        f"{SHARED_MEMORY} has no room for the batches of --workers {workers}; lower --workers or --batch-size, use "
        "--workers 0, or enlarge it (docker run --shm-size 1g), and continue with --resume."
    )


def _start_worker(started: EventType, _: int) -> None:
    """Let the main process alone decide what a signal means (see `stop_signals_blocked`).

    SIGTERM is also how the main process ends a worker that it no longer needs, so a thread looks who sent it. Where the
    system cannot tell (macOS), SIGTERM ends the worker.
    """
    started.set()
    # torch sends batches from a background thread. Its errors are only printed, and the main process waits for ever.
    Queue._on_queue_feeder_error = staticmethod(_exit_after)  # type: ignore[attr-defined]
    # multiprocessing prints that the memory of a batch was not taken; the main process says why.
    sys.excepthook = lambda *_: None
    # Imports what that thread would import at its first tensor, where Python 3.11 can fail with a KeyError.
    ForkingPickler.dumps(torch.empty(0, device="meta"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_after_parent, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=_exit_for_parent, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _exit_after(error: BaseException, _: object) -> None:
    sys.stderr.write(f"nearkin: a worker cannot send a batch: {type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(1)


def _exit_after_parent() -> None:
    """torch looks whether the process that forked the worker is there, which may be a server that outlives the run."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _exit_for_parent() -> None:
    parent = parent_process()
    while parent is None or signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def _spare_files() -> Iterator[None]:
    """See SPARE."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(SPARE)]
    try:
        yield
    finally:
        for file in files:
            os.close(file)


@contextmanager
def _deaths_explained(started: EventType | None) -> Iterator[None]:
    """Raise WorkersDied, or ConfigError where the workers ended while they imported the script."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if any(words in str(error) for words in TOO_MANY_FILES):
            raise WorkersDied(
                "Too many files are open to take images from other processes; raise the limit (ulimit -n), or lower "
                "--workers, and continue with --resume."
            ) from error
        died = isinstance(error, ConnectionError | EOFError) or "DataLoader worker (pid" in str(
            error
        )
        if not died:
            raise
        if started and not started.is_set() and get_start_method() != "fork":
            raise ConfigError(
                "The processes that load images ended while they imported your script; call nearkin under "
                '`if __name__ == "__main__":`, or use workers=0.'
            ) from error
        raise WorkersDied(
            "A process that loads images died, often for want of memory; lower --workers, or use --workers 0, "
            "and continue with --resume."
        ) from error
