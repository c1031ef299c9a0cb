"""The standard streams of the process: UTF-8, and safe when they are closed, full or no longer read."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from nearkin.errors import NearkinError


class OutputFailed(NearkinError):
    """The result could not be written to stdout (exit 75: it can be asked for again)."""

    code = 75


class _Raw(io.RawIOBase):
    """A raw stream that drops everything after its first failed write.

    Otherwise Python writes what is left in the buffer again at exit, fails again and exits with 120.
    """

    def __init__(self, raw: Any, *, report: bool) -> None:
        self._raw, self._report, self._failed = raw, report, False

    def write(self, data: Any) -> int:
        try:
            if not self._failed:
                return int(self._raw.write(data) or 0)
        except OSError as error:
            self._failed = True
            if self._report and isinstance(error, BrokenPipeError):
                raise
            if self._report:
                raise OutputFailed(
                    f"The result could not be written to stdout: {error.strerror}; make room and ask again, "
                    "files that were written are complete."
                ) from None
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


def prepare_streams() -> None:
    """Replace `sys.stdout` and `sys.stderr`. For the command line only: it changes the whole process.

    Closed streams are opened on the null device, since the next file to be opened would take their place. Both
    streams are UTF-8 whatever the locale. A failed write to stderr is ignored, one to stdout raises `OutputFailed`
    or BrokenPipeError. Paths that are not UTF-8 reach stdout as the bytes that they are.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _stream(sys.stdout, 1, errors="surrogateescape", report=True)
    sys.stderr = _stream(sys.stderr, 2, errors="backslashreplace", report=False)


def _stream(stream: Any, number: int, *, errors: str, report: bool) -> io.TextIOWrapper:
    if stream is None:  # it was closed
        raw, by_line = io.FileIO(number, "w", closefd=False), False
    else:
        raw = getattr(stream.buffer, "raw", stream.buffer)  # PYTHONUNBUFFERED leaves the buffer out
        by_line = stream.line_buffering or stream.write_through
    buffer = io.BufferedWriter(_Raw(raw, report=report))
    return io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=by_line)
