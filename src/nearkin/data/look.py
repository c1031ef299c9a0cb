"""One look at each image file: what cannot be read is known before training, and remembered for later runs."""

from __future__ import annotations

import csv
import io
import os
import statistics
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate, islice
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.decode import BadImage, inspect, quiet_pillow
from nearkin.data.images import Files, ImageSource
from nearkin.data.remembered import BATCH, Fact, Remembered
from nearkin.errors import DataError, NearkinError, printable
from nearkin.files import write_atomic

T = TypeVar("T")
Check = Literal["auto", "full", "headers"]
MOST_DECODED = 100_000  # files that are not yet known, up to which `auto` decodes them
CHUNK = 64  # files per task of a thread, which hides the cost of a task
AHEAD = 16  # tasks that may wait to be taken in, at least; a transaction takes some milliseconds
QUIET_SECONDS = 2.0  # before a bar is shown
SAMPLE = 200  # images whose size is read to find the usual one
NAMED = 3


class BadImages(DataError):
    """Images that cannot be read, where the policy is to stop. bad: all of them."""

    def __init__(self, message: str, bad: tuple[BadImage, ...]) -> None:
        super().__init__(message, bad)
        self.bad = bad

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def found(cls, bad: Sequence[BadImage], total: int) -> BadImages:
        """The error for `bad` among `total` images."""
        first = "; ".join(f"{printable(b.path)} ({printable(b.reason)})" for b in bad[:NAMED])
        rest = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        return cls(
            f"{len(bad)} of {total} images cannot be read: {first}{rest}. Repair or delete them, or "
            "leave them out with --bad-images skip.",
            tuple(bad),
        )


class Ranks(NamedTuple):
    """The processes of one node, which share the work. exchange: collects what each of them holds, on all of them."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    @classmethod
    def on_node(cls, rank: int, per_node: int, collect: Callable[[Any], list[Any]]) -> Ranks:
        """Those of the node of `rank`, where each node has `per_node` ranks in a row. collect: what every rank of all
        nodes holds, on each; every rank has to take part in each exchange."""
        first = rank - rank % per_node
        return cls(rank - first, per_node, lambda value: collect(value)[first : first + per_node])


ALONE = Ranks()


class Looked(NamedTuple):
    """bad: for each source, row -> what is wrong. notes: what a person should know."""

    bad: dict[str, dict[int, BadImage]]
    notes: tuple[str, ...]


class Examined(NamedTuple):
    """image: the pixels, if the file was decoded. fact: what there is to remember; None after an error of the system,
    which says nothing about the file. problem: what is wrong with it, if anything."""

    image: Tensor | None
    fact: Fact | None
    problem: BadImage | None


def look(
    sources: Mapping[str, Files], check: Check, *, ranks: Ranks = ALONE, quiet: bool = True
) -> Looked:
    """Find the files that cannot be read. Only files that are new, or changed since an earlier look, are opened.

    check: `full` decodes files, `headers` reads their beginning and end (see `inspect`), `auto` decodes up to
    100 000 new files and reads the headers of more. A file that was decoded once needs no other look; one of which the
    header was read is enough for `headers` and `auto`. The files are shared out over the ranks of a node, and every
    rank returns the whole result. quiet: without a bar on stderr.

    Raises the NearkinError of any rank on all of them.
    """
    files = NumberedFiles(sources)
    share = np.arange(len(files))
    share = share[share // CHUNK % ranks.size == ranks.rank]
    with Remembered() as remembered:
        bar = _Bar(quiet or ranks.rank > 0)
        compared = _on_all(ranks, lambda: _compare(files, share, check, remembered, bar))
        if len({one.files for one in compared}) > 1:
            raise DataError("The processes see different files; give all of them the same data.")
        count = sum(len(one.new) for one in compared)
        full = check == "full" or (check == "auto" and count <= MOST_DECODED)
        new, workers = compared[ranks.rank].new, max(1, (os.cpu_count() or 1) // ranks.size)
        learned = _on_all(ranks, lambda: _learn(files, new, full, workers, remembered, bar))
    bad: dict[int, BadImage] = {}
    for part in (*(one.bad for one in compared), *learned):
        bad |= part
    notes = [remembered.note] if remembered.note else []
    if check == "auto" and not full:
        notes.append(
            f"of {count} new images only the header and the end of the file are checked; "
            "--check full decodes every image once"
        )
    return Looked(files.by_source(bad), tuple(notes))


class NumberedFiles:
    """The files of several sources, numbered one after the other."""

    def __init__(self, sources: Mapping[str, Files]) -> None:
        self.sources = dict(sources)
        self._all = list(sources.values())
        self._begins = [0, *accumulate(map(len, self._all))]
        # Not resolved: what a link leads to is found anew by the size and the time of the file.
        self._folders = [os.fsencode(os.path.abspath(one.files.root)) for one in self._all]  # noqa: PTH100

    def __len__(self) -> int:
        return self._begins[-1]

    def named(self, number: int, reason: str) -> BadImage:
        """What is wrong with a file, under the path as it was given."""
        source = bisect_right(self._begins, number) - 1
        return BadImage(self._all[source].path(number - self._begins[source]), reason)

    def key(self, number: int) -> bytes:
        """The absolute path, under which a file is remembered."""
        source = bisect_right(self._begins, number) - 1
        name = self._all[source].files.encoded(number - self._begins[source])
        return os.path.join(self._folders[source], name)  # noqa: PTH118 - bytes

    def by_source(self, bad: Mapping[int, BadImage]) -> dict[str, dict[int, BadImage]]:
        """For each source its bad rows in order."""
        found = {}
        for (name, source), begin in zip(self.sources.items(), self._begins, strict=False):
            rows = sorted(number for number in bad if begin <= number < begin + len(source))
            found[name] = {number - begin: bad[number] for number in rows}
        return found


class _Compared(NamedTuple):
    """files: how many there are on all ranks together. new: `[n]`, the files of this rank that are to be opened."""

    files: int
    new: NDArray[np.int64]
    bad: dict[int, BadImage]


def _compare(
    files: NumberedFiles,
    share: NDArray[np.int64],
    check: Check,
    remembered: Remembered,
    bar: _Bar,
) -> _Compared:
    """Which files are still as they were when they were looked at."""
    new: list[int] = []
    bad: dict[int, BadImage] = {}
    with bar.over(len(share), "images compared with the last look"):
        for start in range(0, len(share), BATCH):
            numbers = share[start : start + BATCH].tolist()
            paths = [files.key(number) for number in numbers]
            known = remembered.known(paths)
            for number, path in zip(numbers, paths, strict=True):
                fact = known.get(path)
                if fact is None or not fact.holds(path) or (check == "full" and not fact.full):
                    new.append(number)
                elif fact.reason is not None:
                    bad[number] = files.named(number, fact.reason)
            bar.advance(len(numbers))
    return _Compared(len(files), np.array(new, dtype=np.int64), bad)


def _learn(
    files: NumberedFiles,
    new: NDArray[np.int64],
    full: bool,
    workers: int,
    remembered: Remembered,
    bar: _Bar,
) -> dict[int, BadImage]:
    """Open the files and remember what was found."""
    bad: dict[int, BadImage] = {}
    facts: dict[bytes, Fact] = {}
    channels = next(iter(files.sources.values())).channels if files.sources else 3

    def opened(number: int) -> tuple[int, bytes, Fact | None, BadImage | None]:
        path = files.key(number)
        _, fact, problem = examine(os.fsdecode(path), channels, full)
        return number, path, fact, problem

    with bar.over(len(new), "images looked at"), quiet_pillow():
        try:
            for chunk in in_threads(opened, new.tolist(), workers):
                for number, path, fact, problem in chunk:
                    if fact is not None:
                        facts[path] = fact
                    if problem is not None:
                        bad[number] = files.named(number, problem.reason)
                bar.advance(len(chunk))
                if len(facts) >= BATCH:
                    remembered.keep(facts)
                    facts = {}
        finally:
            remembered.keep(facts)
    return bad


def examine(path: str, channels: int, full: bool) -> Examined:
    """Open an image file (see `inspect`)."""
    try:
        status = os.stat(path)  # noqa: PTH116 - before the file is read: a later change is noticed
        image, header = inspect(path, channels=channels, full=full)
    except BadImage as error:
        # A fresh one: the traceback of the caught one would keep the file's bytes in memory.
        problem = BadImage(path, printable(error.reason))
        if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
            return Examined(None, None, problem)
        fact = Fact(status.st_size, status.st_mtime_ns, 1, 0, 0, 0, problem.reason)
        return Examined(None, fact, problem)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Examined(None, None, BadImage(path, printable(reason.lower())))
    fact = Fact(status.st_size, status.st_mtime_ns, int(image is not None), *header, None)
    return Examined(image, fact, None)


def usual_side(images: ImageSource) -> int:
    """The median short side, in pixels, of up to 200 evenly spread images that can be read.

    Raises DataError when none of all can be read.
    """
    count = len(images)
    rows = range(0, count, max(1, count // SAMPLE))
    if not isinstance(images, Files):
        return int(statistics.median(min(images.read(row).shape[-2:]) for row in rows))
    files = NumberedFiles({"": images})
    with Remembered() as remembered:
        known = remembered.known([files.key(row) for row in rows])

    def side(row: int) -> int:
        """0 where the image cannot be read."""
        fact = known.get(files.key(row))
        if fact is None or not fact.holds(files.key(row)):
            fact = examine(images.path(row), images.channels, full=False).fact
        return 0 if fact is None else min(fact.width, fact.height)

    sides = [found for found in map(side, rows) if found]
    if not sides:
        sides = list(islice(filter(None, map(side, range(count))), 1))
    if not sides:
        raise DataError(
            f"None of the {count} images can be read, such as {printable(images.name(0))}."
        )
    return int(statistics.median(sides))


def in_threads(
    work: Callable[[int], T], rows: Iterable[int], workers: int, chunk: int = CHUNK
) -> Iterator[list[T]]:
    """The results of `work` for all rows, some at a time, in order, computed a little ahead in `workers` threads.

    Decoding releases Python's lock, so threads run side by side. When the caller leaves early, as by Ctrl-C, each
    thread ends after its present row.
    """
    stopped = Event()
    remaining = iter(rows)

    def some(chosen: list[int]) -> list[T]:
        return [work(row) for row in chosen if not stopped.is_set()]

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
        pool.shutdown(wait=False, cancel_futures=True)


def _on_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """The result of `work` on each rank, on all ranks. Raises the first NearkinError on all of them."""
    result: T | None = None
    problem: NearkinError | None = None
    try:
        result = work()
    except NearkinError as error:
        problem = error
    outcomes = ranks.exchange((result, problem))
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


class _Bar:
    """Images and images per second on stderr, once that takes two seconds; outside a terminal one line of text."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._progress: Any = None

    @contextmanager
    def over(self, total: int, what: str) -> Iterator[None]:
        """Count `total` images inside the block."""
        self._total, self._what, self._done = total, what, 0
        self._started, self._shown = time.monotonic(), False
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def advance(self, count: int) -> None:
        self._done += count
        if not self._quiet and not self._shown and time.monotonic() - self._started > QUIET_SECONDS:
            self._shown = True
            self._show()
        if self._progress is not None:
            speed = self._done / (time.monotonic() - self._started)
            self._progress.update(self._task, completed=self._done, speed=f"{speed:.0f} files/s")

    def _show(self) -> None:
        if not sys.stderr.isatty():
            with suppress(OSError, ValueError):
                print(f"{self._total} {self._what} ...", file=sys.stderr, flush=True)  # noqa: T201
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = TextColumn(self._what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        speed = TextColumn("{task.fields[speed]}")
        console = Console(stderr=True)
        self._progress = Progress(*columns, speed, console=console, transient=True)
        self._task = self._progress.add_task("", total=self._total, speed="")
        self._progress.start()


def write_bad_files(path: Path, bad: Iterable[BadImage]) -> None:
    """A CSV of path and reason. Any file name survives: UTF-8 with `surrogateescape`, line ends kept.

    Raises SaveFailed when the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "reason"))
    writer.writerows((image.path, image.reason) for image in bad)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
