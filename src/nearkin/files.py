"""Atomic writes: after a crash, a full disk or a power cut a file has its old or its new content. And lines of CSV."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nearkin.errors import DataError, ResumableError, printable

if TYPE_CHECKING:
    from typing_extensions import Buffer

CACHE = "NEARKIN_CACHE_DIR"


class SaveFailed(ResumableError):
    """A file could not be written; its earlier content is untouched."""


@contextlib.contextmanager
def reporting(failure: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `SaveFailed` that begins with `failure`."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{failure}: {error.strerror or error}; what was saved before is untouched, "
            "free space or repair the permissions, and run again."
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to a new file and fsync it. Raises `OSError`; a file or a link that is there is not opened."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """fsync `folder`, which makes renames in it durable. Raises `OSError`."""
    if os.name == "nt":  # Windows cannot open folders and orders renames itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_folder(path: Path) -> None:
    """Make `path` unless it is there. Raises `OSError`, also where it is a link, as someone else's run folder may hold:
    nothing is written to or deleted from what it names."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "the folder is a link", str(path))
    if not path.is_dir():
        path.mkdir(exist_ok=True)  # another process may have just made it


def csv_line(fields: Iterable[object]) -> str:
    """One line of CSV. Line breaks of any kind are quoted, which Python 3.11 forgets for those that end no line."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    return text.getvalue().removesuffix("\r\n") + "\n"


class _Reporting(io.FileIO):
    """A new file whose writes raise `SaveFailed`."""

    def __init__(self, path: Path, failure: str) -> None:
        super().__init__(path, "xb")
        self._failure = failure

    def write(self, data: Buffer, /) -> int:
        with reporting(self._failure):
            return os.write(self.fileno(), data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one step at the end of the block, unless that raises: readers see
    the old or the new bytes.

    The temporary file is in the same folder, since a rename is atomic inside one file system only. Of several writers
    one wins. Raises `SaveFailed`, also from writing to the file.
    """
    # A part of the name: with more, the longest names that a file system allows would be too long. The sum tells names
    # apart that begin alike: threads write them at once.
    number = zlib.crc32(os.fsencode(path.name))
    temporary = path.with_name(f".tmp-{path.name[:40]}-{number:08x}-{os.getpid()}")
    failure = f"{printable(str(path))} could not be written"
    try:
        with reporting(failure):
            temporary.unlink(missing_ok=True)  # of a killed process with the same number
            raw = _Reporting(temporary, failure)
        with io.BufferedWriter(raw) as file:
            yield file
            with reporting(failure):
                file.flush()
                os.fsync(file.fileno())
        with reporting(failure):
            temporary.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data` in one step (see `replacing`). Raises `SaveFailed`."""
    with replacing(path) as file:
        file.write(data)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV in UTF-8; bytes of file names that are not UTF-8 stay as they are. Raises `SaveFailed`.

    `open(path, newline="", encoding="utf-8", errors="surrogateescape")` and the csv module give every text and number
    back exactly.
    """
    text = "".join(map(csv_line, (header, *rows)))
    write_atomic(path, text.encode("utf-8", "surrogateescape"))


def cache_folder() -> Path:
    """The folder of downloads, of `--cache disk` and of what is known of image files: $NEARKIN_CACHE_DIR, else
    ~/.cache/nearkin. Raises DataError."""
    given = os.environ.get(CACHE)
    try:
        folder = Path(given) if given else Path.home() / ".cache" / "nearkin"
    except RuntimeError:  # in a container, whose user has no entry
        raise DataError(
            f"This user has no home folder to cache in; set {CACHE} to a folder that can be written."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The cache folder {printable(str(folder))} cannot be made ({error.strerror}); "
            f"set {CACHE} to a folder that can be written."
        ) from None
    return folder
