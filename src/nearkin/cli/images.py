"""The words IMAGES of a command line: files, folders, patterns and `-`, a list on stdin."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from nearkin.errors import DataError


def image_files(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that the words stand for, in order, and notes about folders (see `find_files`).

    Raises DataError for a path that does not exist and for an empty list. A path in a list on stdin may be missing: it
    gives a row with an error, so that one file that has gone does not stop the others.
    """
    from nearkin.evaluation.predict import find_files

    files: list[str] = []
    notes: list[str] = []
    for word in words:
        listed = read_list() if word == "-" else [word]
        for path in listed:
            if word == "-" and not os.path.isdir(path):  # noqa: PTH112 - a Path would normalise it
                files.append(path)
                continue
            found, more = find_files(path)
            files += found
            notes += more
    return files, notes


def read_list() -> list[str]:
    """The paths on stdin: each ended by NUL where there is one (`find -print0`), else one a line.

    Raises DataError when there is none.
    """
    content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    if b"\0" in content:
        paths = content.split(b"\0")
    else:
        paths = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    found = [os.fsdecode(path) for path in paths if path]
    if not found:
        raise DataError("There are no paths on stdin; write one a line, or name images.")
    return found
