"""Batches of images. What a batch holds depends on its keys alone, never on the worker that makes it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nearkin.data.dataset import Split
from nearkin.data.decode import BadImage
from nearkin.data.sampling import SampleKey, sample_seed
from nearkin.data.transforms import Pipeline, Transform
from nearkin.errors import DataError, NearkinError
from nearkin.types import Batch

# Decoded images are transformed together until they have this many bytes: draws in a row find their code in the
# processor's caches, but photographs are large.
TOGETHER = 1 << 23

Placed = tuple[int, int, Tensor]  # view, place in the batch, image


class WorkersDied(NearkinError):
    """A process that loads images ended before its work (exit 75: what was saved can be continued)."""

    code = 75


def train_loader(
    split: Split,
    transform: Transform,
    order: Iterable[list[SampleKey]],
    *,
    views: int,
    seed: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """One `Batch` for each list of keys in `order`: images uint8 `[views, b, C, H, W]`, labels and index `[b]`.

    Each view is made under a random state that `sample_seed` gives, so that 0, 1 or 4 workers make the same
    batches; the global random states are left as they were. index: the row in the split.

    Raises DataError when an image can no longer be read, WorkersDied when a worker ends early.
    """
    return _batches(_TrainViews(split, transform, views, seed), order, workers, pin_memory)


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

    views: a decoded image -> what is judged of it, as many for every image. Raises as `train_loader`.
    """
    order = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return _batches(_PlainViews(split, views), order, workers, pin_memory)


class _Views(Dataset[Batch | DataError]):
    """Makes whole batches, and gives an error back as a value: torch would lose its text and its class."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def rows(self, keys: Sequence[Any]) -> list[int]:
        raise NotImplementedError

    def views(self, keys: Sequence[Any]) -> Tensor:
        """`[V, b, C, H, W]` of b keys."""
        raise NotImplementedError

    def __getitems__(self, keys: Sequence[Any]) -> Batch | DataError:
        try:
            views = self.views(keys)
        except BadImage as error:
            return error.by_now()
        rows = self.rows(keys)
        return Batch(views, torch.from_numpy(self.split.labels[rows]), torch.tensor(rows))


class _PlainViews(_Views):
    """Keys are rows."""

    def __init__(self, split: Split, make: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__(split)
        self.make = make

    def rows(self, keys: Sequence[int]) -> list[int]:
        return list(keys)

    def views(self, keys: Sequence[int]) -> Tensor:
        made = [self.make(self.split.images.read(row)) for row in keys]
        views = range(len(made[0]))
        placed = ((view, place, made[place][view]) for view in views for place in range(len(keys)))
        return _stacked(placed, len(views), len(keys))


class _TrainViews(_Views):
    """Keys say which draw of an image this is."""

    def __init__(self, split: Split, transform: Transform, views: int, seed: int) -> None:
        super().__init__(split)
        self.transform, self.count, self.seed = transform, views, seed

    def rows(self, keys: Sequence[SampleKey]) -> list[int]:
        return [key.row for key in keys]

    def views(self, keys: Sequence[SampleKey]) -> Tensor:
        transform = self.transform
        if not (isinstance(transform, Pipeline) and transform.keyed):
            return _stacked(self._one_by_one(keys), self.count, len(keys))
        return _stacked(self._some_at_a_time(keys, transform), self.count, len(keys))

    def _some_at_a_time(self, keys: Sequence[SampleKey], transform: Pipeline) -> Iterator[Placed]:
        some: list[Tensor] = []
        size = 0
        for place, key in enumerate(keys, 1):
            some.append(self.split.images.read(key.row))
            size += some[-1].nbytes
            if place == len(keys) or size >= TOGETHER:
                start = place - len(some)
                for view in range(self.count):
                    made = transform.of_each(some, self._seeds(keys[start:place], view))
                    yield from ((view, start + i, image) for i, image in enumerate(made))
                some, size = [], 0

    def _one_by_one(self, keys: Sequence[SampleKey]) -> Iterator[Placed]:
        seeds = list(zip(*(self._seeds(keys, view) for view in range(self.count)), strict=True))
        with _borrowed_random_states():
            for place, (key, own) in enumerate(zip(keys, seeds, strict=True)):
                image = self.split.images.read(key.row)
                for view, seed in enumerate(own):
                    _seed(seed)
                    yield view, place, self.transform(image)

    def _seeds(self, keys: Sequence[SampleKey], view: int) -> list[int]:
        return [sample_seed(self.seed, k.epoch, k.row, k.occurrence, view) for k in keys]


def _stacked(placed: Iterable[Placed], views: int, count: int) -> Tensor:
    """`[V, b, C, H, W]`, in memory as the first image is. Each is copied as it comes, while it is still in the
    processor's caches.

    Raises ValueError for images of several sizes.
    """
    placed = iter(placed)
    view, place, image = next(placed)
    stack, shape = _room(image, (views, count)), image.shape
    slots = [each.unbind() for each in stack]
    slots[view][place].copy_(image)
    for view, place, image in placed:
        if image.shape != shape:  # copy_ would broadcast
            raise ValueError(f"Images of {tuple(shape)} and of {tuple(image.shape)}.")
        slots[view][place].copy_(image)
    return stack


def _room(image: Tensor, places: tuple[int, ...]) -> Tensor:
    """Room for as many such images."""
    channels, height, width = image.shape
    if channels > 1 and image.stride(0) == 1:
        # Colours side by side, as decoders and resizing leave them.
        return image.new_empty((*places, height, width, channels)).movedim(-1, -3)
    return image.new_empty((*places, channels, height, width))


def _seed(seed: int) -> None:
    """For torch, whose RNG our transforms use, and for Python and NumPy, which a caller's own may use."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global state is what such transforms read


@contextmanager
def _borrowed_random_states() -> Iterator[None]:
    """Give the global random states back as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def _batches(
    views: _Views, order: Iterable[Sequence[Any]], workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader: DataLoader[Batch | DataError] = DataLoader(
        views,
        batch_sampler=order,  # type: ignore[arg-type]  # any iterable of keys will do
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_obey_parent_only,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise each loader would draw from the global state
    )
    with _named_deaths():
        yield from map(_batch, loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _batch(made: Batch | DataError) -> Batch:
    if isinstance(made, DataError):
        raise made
    return made


def _obey_parent_only(_: int) -> None:
    """The main process decides what a signal means; workers that died of it would spoil its last step.

    SIGTERM is also how the main process ends a worker that it no longer needs, so a thread looks who sent
    it. Where the system cannot tell (macOS, Windows), SIGTERM keeps ending the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _named_deaths() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise WorkersDied(
            "A process that loads images died, often for want of memory or of room in /dev/shm; "
            "lower --workers, or use --workers 0, and continue with --resume."
        ) from error
