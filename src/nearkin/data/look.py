"""Every image file is decoded once before training: what cannot be read is known at the start."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from nearkin.data.decode import BadImage, quiet_pillow
from nearkin.data.images import ImageSource
from nearkin.errors import DataError, printable
from nearkin.files import write_atomic

CHUNK = 64  # images per task: enough to hide the cost of a task
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
            f"{len(bad)} of {total} images cannot be read: {first}{rest}. Mend or delete them, or "
            "leave them out with --bad-images skip.",
            tuple(bad),
        )


def scan(images: ImageSource, *, workers: int) -> dict[int, BadImage]:
    """Decode every image in `workers` threads: row -> what is wrong, in the order of the rows.

    Decoding releases Python's lock, so threads run side by side. Arrays need no scan.
    """
    if not images.from_files:
        return {}
    starts = range(0, len(images), CHUNK)
    with quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(lambda start: _check(images, start), starts)
        return dict(chain.from_iterable(found))


def _check(images: ImageSource, start: int) -> list[tuple[int, BadImage]]:
    bad = []
    for row in range(start, min(start + CHUNK, len(images))):
        try:
            images.read(row)
        except BadImage as error:
            # A fresh one: the traceback of the caught one would keep the file's bytes in memory.
            bad.append((row, BadImage(error.path, error.reason)))
    return bad


def write_bad_files(path: Path, bad: Iterable[BadImage]) -> None:
    """A CSV of path and reason. Any file name survives: UTF-8 with `surrogateescape`, line ends kept.

    Raises SaveFailed when the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "reason"))
    writer.writerows((image.path, image.reason) for image in bad)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
