"""Work on many files side by side, in threads: the results come in order, computed a little ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from threading import Event
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
CHUNK = 64  # files per task of a thread, which hides the cost of a task
AHEAD = 16  # tasks that may wait to be taken in, at least; a transaction takes some milliseconds
# Threads that ask the file system: they wait for its answers, for a file of a network up to a millisecond each.
ASKING = 16


def in_threads(
    work: Callable[[S], T], items: Iterable[S], workers: int, chunk: int = CHUNK
) -> Generator[list[T]]:
    """The results of `work` for all items, some at a time, in order, computed a little ahead in `workers` threads.

    Decoding releases Python's lock, so threads run side by side. When the caller leaves early, as by Ctrl-C, each
    thread ends after its present item.
    """
    stopped = Event()
    remaining = iter(items)

    def some(chosen: list[S]) -> list[T]:
        return [work(item) for item in chosen if not stopped.is_set()]

    pool = ThreadPoolExecutor(max(1, workers))
    waiting: deque[Future[list[T]]] = deque()
    try:
        while True:
            while len(waiting) < max(AHEAD, 2 * workers) and (
                chosen := list(islice(remaining, chunk))
            ):
                waiting.append(pool.submit(some, chosen))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        stopped.set()
        # With nothing left to do the threads end at once, and a fork that comes next finds none of them.
        pool.shutdown(wait=not waiting, cancel_futures=True)


def statuses(paths: Iterable[str | bytes]) -> Generator[os.stat_result | None]:
    """`status` of each path, in order."""
    with closing(in_threads(status, paths, ASKING)) as chunks:
        yield from chain.from_iterable(chunks)


def status(path: str | bytes) -> os.stat_result | None:
    """What the file system says of a file; None where there is none."""
    try:
        return os.stat(path)  # noqa: PTH116 - a Path would normalise it
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return None
