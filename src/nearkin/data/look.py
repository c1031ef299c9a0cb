"""One look at each image file: what cannot be read is known before training, and remembered for later runs."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from nearkin.data.decode import BadImage, Header, inspect, quiet_pillow
from nearkin.data.images import Files, ImageSource
from nearkin.data.remembered import Fact, Remembered
from nearkin.data.threads import CHUNK, in_threads, status, statuses
from nearkin.errors import DataError, printable
from nearkin.files import write_csv
from nearkin.process import agreed, cores

C = TypeVar("C", bound=Sized)
Check = Literal["auto", "full", "headers"]
MOST_DECODED = 100_000  # files that are not yet known, up to which `auto` decodes them
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
    """bad: absolute path of each file that cannot be read -> why. notes: what a person should know."""

    bad: dict[bytes, str]
    notes: tuple[str, ...]


class Examined(NamedTuple):
    """image: the pixels, if the file was decoded. fact: what there is to remember; None after an error of the system,
    which says nothing about the file. reason: what is wrong with it, if anything. header: of a file that can be used.
    """

    image: Tensor | None
    fact: Fact | None
    reason: str | None
    header: Header | None = None


def look(
    sources: Mapping[str, Files], check: Check, *, ranks: Ranks = ALONE, quiet: bool = True
) -> Looked:
    """Find the files that cannot be read. Only files that are new, or changed since an earlier look, are opened.

    check: `full` decodes files, `headers` reads their beginning and end (see `inspect`), `auto` decodes up to
    100 000 new files and reads the headers of more. A file that was decoded once needs no other look; one of which the
    header was read is enough for `headers` and `auto`. A bad one is decoded each time: the memory may have run out, of
    which decoders tell as of damage. The files are shared out over the ranks of a node, and every rank returns the
    whole result. quiet: without a bar on stderr.

    Raises the NearkinError of any rank on all of them.
    """
    rows = [
        (files, range(start, min(start + CHUNK, len(files))))
        for files in sources.values()
        for start in range(0, len(files), CHUNK)
    ]
    share, total = rows[ranks.rank :: ranks.size], sum(map(len, sources.values()))
    channels = next(iter(sources.values())).channels if sources else 3
    new: dict[bytes, bool] = {}
    quiet = quiet or ranks.rank > 0
    with Remembered() as remembered:
        known = agreed(
            ranks.exchange,
            lambda: (total, _compare(share, check, remembered, new, quiet)),
        )
        if len({files for files, _ in known}) > 1:
            raise DataError("The processes see different files; give all of them the same data.")
        count = sum(found for _, found in known)
        full = check == "full" or (check == "auto" and count <= MOST_DECODED)
        learned = agreed(
            ranks.exchange, lambda: _learn(new, channels, full, cores(), remembered, quiet)
        )
    bad: dict[bytes, str] = {}
    for part in learned:
        bad |= part
    notes = [remembered.note] if remembered.note else []
    if check == "auto" and not full:
        notes.append(
            f"of {count} new images only the header and the end of the file are checked; "
            "--check full decodes every image once"
        )
    return Looked(bad, tuple(notes))


def _compare(
    share: Sequence[tuple[Files, range]],
    check: Check,
    remembered: Remembered,
    new: dict[bytes, bool],
    quiet: bool,
) -> int:
    """How many files are not as they were at an earlier look, or not known well enough; they are added to `new`, and
    so is what was bad then, which has to be decoded."""
    chunks = ([files.key(row) for row in rows] for files, rows in share)  # one query each
    total = sum(len(rows) for _, rows in share)
    with closing(statuses(files.key(row) for files, rows in share for row in rows)) as found:
        for paths in shown(chunks, total, "images compared with the last look", quiet):
            known = remembered.known(paths)
            for path, now in zip(paths, found, strict=False):  # `found` goes on in the next chunk
                fact = known.get(path)
                if fact is None or not fact.holds(now) or (check == "full" and not fact.full):
                    new[path] = False
                elif fact.reason is not None:
                    new[path] = True
    return len(new) - sum(new.values())


def _learn(
    new: Mapping[bytes, bool],
    channels: int,
    full: bool,
    workers: int,
    remembered: Remembered,
    quiet: bool,
) -> dict[bytes, str]:
    """Open the files and remember what was found. new: path -> whether it has to be decoded. Returns what is wrong."""
    bad: dict[bytes, str] = {}

    def opened(path: bytes) -> tuple[bytes, Fact | None, str | None]:
        _, fact, reason, _ = examine(path, channels, full or new[path])
        return path, fact, reason

    # Closed at once when this is left, as by Ctrl-C: the traceback would hold it, and its threads with it.
    with quiet_pillow, closing(in_threads(opened, new, workers)) as chunks:
        for path, fact, reason in chain.from_iterable(
            shown(chunks, len(new), "images looked at", quiet)
        ):
            if fact is not None and (reason is None or not new[path]):  # else it is known
                remembered.keep(path, fact)
            if reason is not None:
                bad[path] = reason
    return bad


def examine(path: bytes, channels: int, full: bool, least: int = 0) -> Examined:
    """Open an image file (see `inspect`)."""
    try:
        found = os.stat(path)  # noqa: PTH116 - before the file is read: a later change is noticed
        image, header = inspect(os.fsdecode(path), channels=channels, full=full, least=least)
    except BadImage as error:
        reason = printable(error.reason)
        if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
            return Examined(None, None, reason)
        return Examined(None, Fact(found.st_size, found.st_mtime_ns, 1, 0, 0, 0, reason), reason)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Examined(None, None, printable(reason.lower()))
    full = image is not None
    fact = Fact(found.st_size, found.st_mtime_ns, full, *header[:3], None)
    return Examined(image, fact, None, header)


def usual_side(images: ImageSource) -> int:
    """The median short side, in pixels, of up to 200 evenly spread images that can be read.

    Raises DataError when none of all can be read.
    """
    count = len(images)
    rows = range(0, count, max(1, count // SAMPLE))
    if not isinstance(images, Files):
        return int(statistics.median(min(images.read(row).shape[-2:]) for row in rows))
    with Remembered() as remembered:
        known = remembered.known([images.key(row) for row in rows])

    def side(row: int) -> int:
        """0 where the image cannot be read."""
        path = images.key(row)
        fact = known.get(path)
        if fact is None or fact.reason is not None or not fact.holds(status(path)):
            fact = examine(path, images.channels, full=False).fact
        return 0 if fact is None else min(fact.width, fact.height)

    sides = [found for found in map(side, rows) if found]
    if not sides:
        sides = list(islice(filter(None, map(side, range(count))), 1))
    if not sides:
        raise DataError(
            f"None of the {count} images can be read, such as {printable(images.name(0))}."
        )
    return int(statistics.median(sides))


def shown(chunks: Iterable[C], total: int, what: str, quiet: bool) -> Iterator[C]:
    """The chunks, with a bar on stderr once that takes two seconds; outside a terminal one line of text."""
    started, done, bar = time.monotonic(), 0, None
    try:
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            seconds = time.monotonic() - started
            if not quiet and seconds > QUIET_SECONDS:
                quiet, bar = True, _started_bar(total, what)
            if bar is not None:
                speed = f"{done / seconds:.0f} files/s"
                bar.update(bar.task_ids[0], completed=done, speed=speed)
    finally:
        if bar is not None:
            bar.stop()


def _started_bar(total: int, what: str) -> Any:
    if not sys.stderr.isatty():
        with suppress(OSError, ValueError):
            print(f"{total} {what} ...", file=sys.stderr, flush=True)  # noqa: T201
        return None
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task("", total=total, speed="")
    bar.start()
    return bar


def write_bad_files(path: Path, bad: Iterable[BadImage]) -> None:
    """A CSV of path and reason, in which any file name survives. Raises SaveFailed."""
    write_csv(path, ("path", "reason"), ((image.path, image.reason) for image in bad))
