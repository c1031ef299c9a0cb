"""What was learned of image files, kept in one SQLite file of the cache folder for later runs."""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from nearkin.data.decode import decoder
from nearkin.errors import DataError, printable
from nearkin.files import cache_folder

STORE = "look.sqlite"
BATCH = 2048  # files per transaction
PATIENCE = 60.0  # seconds that a process waits for others that write
DAMAGED = sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB


class Fact(NamedTuple):
    """What is remembered of a file. size in bytes and mtime in nanoseconds say whether it is still the same file.

    full: whether it was decoded. width, height, channels: as stored in the file, 0 for a bad one. reason: why it
    cannot be used, or None.
    """

    size: int
    mtime: int
    full: int
    width: int
    height: int
    channels: int
    reason: str | None

    def holds(self, status: os.stat_result | None) -> bool:
        """Whether the file has still the size and the time of change of this fact. status: of the file, if there."""
        return status is not None and (status.st_size, status.st_mtime_ns) == self[:2]

    def checksum(self, path: bytes) -> int:
        """CRC-32 of the row in the database: a damaged row, or one that another decoder wrote, is ignored."""
        reason = b"-" if self.reason is None else self.reason.encode("utf-8", "surrogatepass")
        return zlib.crc32(b"%b %d %d %d %d %d %d %b\0%b" % (decoder(), *self[:6], reason, path))


class Remembered:
    """The SQLite file in the cache folder. Any number of processes may use it at once. Where it cannot be used,
    `note` says why, `known` finds nothing and `keep` stores nothing."""

    def __init__(self) -> None:
        self.note: str | None = None
        self._path = ""
        self._connection: sqlite3.Connection | None = None
        self._new: dict[bytes, Fact] = {}
        try:
            self._path = str(cache_folder() / STORE)
        except DataError as error:
            self.note = f"later runs look at the same images again: {error}"
            return
        with self._guarded():
            self._connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, full INTEGER, "
                "width INTEGER, height INTEGER, channels INTEGER, reason TEXT, checksum INTEGER) WITHOUT ROWID"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._close()

    def known(self, paths: Sequence[bytes]) -> dict[bytes, Fact]:
        """What is known of up to 999 `paths`, whether or not the files are still the same."""
        found: dict[bytes, Fact] = {}
        if self._connection is None:
            return found
        query = f"SELECT * FROM files WHERE path IN ({','.join('?' * len(paths))})"
        with self._guarded():
            for path, *values, checksum in self._connection.execute(query, paths):
                fact = Fact(*values)
                with suppress(TypeError, AttributeError):  # damage may change types as well
                    if fact.checksum(path) == checksum:
                        found[path] = fact
        return found

    def keep(self, path: bytes, fact: Fact) -> None:
        """Remember the fact, at the latest at the end of the block."""
        self._new[path] = fact
        if len(self._new) >= BATCH:
            self._write()

    def _write(self) -> None:
        rows = [(path, *fact, fact.checksum(path)) for path, fact in self._new.items()]
        self._new = {}
        if self._connection is None or not rows:
            return
        insert = f"INSERT OR REPLACE INTO files VALUES ({','.join('?' * len(rows[0]))})"
        with self._guarded(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(insert, rows)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After an error of the database it is not used any more."""
        try:
            yield
        except (sqlite3.Error, UnicodeError, TypeError) as error:
            self._close()
            shown = printable(self._path)
            if getattr(error, "sqlite_errorcode", None) in DAMAGED:
                self.note = f"{shown} was damaged and is deleted; all images are looked at again"
                for end in ("", "-journal"):
                    with suppress(OSError):
                        Path(self._path + end).unlink(missing_ok=True)
            else:
                self.note = (
                    f"{shown} cannot be used ({error}), so later runs look at the same images again"
                )
