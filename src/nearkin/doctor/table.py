"""Marks in, and the table of what remains out: what the doctor found can be trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nearkin.data.sources.tables import COLUMNS, text_table
from nearkin.doctor.inventory import Inventory
from nearkin.errors import ConfigError, DataError, counted, printable
from nearkin.files import write_csv

MARKS = ("wrong label", "leave out")


class Marks(NamedTuple):
    """out: rows to leave out. labels: row -> the right label. unknown: paths that are none of the images."""

    out: frozenset[int] = frozenset()
    labels: dict[int, str] = {}  # noqa: RUF012 - never changed
    unknown: tuple[str, ...] = ()


class _Mark(NamedTuple):
    path: str
    mark: str
    correct: str


def read_marks(path: Path, inventory: Inventory) -> Marks:
    """The marks of a person: CSV with the columns path and mark, and optionally label, split and correct.

    path: as in doctor.csv, or relative to the data's folder, or to that of the marks. mark: `wrong label` or `leave
    out`; a row without a mark is ignored. correct: the right label of an image with a wrong one, which then stays in
    the table. Raises DataError for a file that is no such table, another mark, and when no path is one of the images.
    """
    rows = list(_marks(path))
    known = {os.path.normpath(inventory.key(row)): row for row in range(len(inventory.labels))}
    folders = [Path.cwd(), path.parent.absolute(), *_roots(inventory)]
    out, labels, unknown = set(), {}, []
    for mark in rows:
        places = (os.fsencode(os.path.normpath(folder / mark.path)) for folder in folders)
        row = next((known[place] for place in places if place in known), None)
        if row is None:
            unknown.append(mark.path)
        elif mark.mark == "wrong label" and mark.correct:
            labels[row] = mark.correct
        else:
            out.add(row)
    if rows and len(unknown) == len(rows):
        raise DataError(
            f"The {counted(len(rows), 'marked path')} in {printable(str(path))} "
            f"{'is no image' if len(rows) == 1 else 'are no images'} of these data, "
            f"such as {printable(unknown[0])}; give the data that were marked."
        )
    return Marks(frozenset(out), labels, tuple(unknown))


def _roots(inventory: Inventory) -> Iterator[Path]:
    for part in inventory.splits.values():
        yield Path(part.images.files.root).absolute()  # type: ignore[attr-defined]


def _marks(path: Path) -> Iterator[_Mark]:
    shown = printable(str(path))
    try:
        lines = text_table(str(path))
        _, header = next(lines)
        if header.count("path") != 1 or header.count("mark") != 1:
            raise DataError(f"{shown} must have a header with the columns path and mark.")
        for where, fields in lines:
            values = dict(zip(header, fields, strict=True))
            mark = values["mark"].strip().lower()
            if mark and mark not in MARKS:
                raise DataError(
                    f"{shown}, {where}: the mark '{printable(mark)}' is none of {', '.join(MARKS)}."
                )
            if mark:
                yield _Mark(values["path"], mark, values.get("correct", "").strip())
    except OSError as error:
        raise DataError(
            f"The marks {shown} cannot be read: {(error.strerror or str(error)).lower()}."
        ) from None


def check_table(path: Path) -> None:
    """Raises ConfigError where the table cannot or must not be written: a file that exists is never replaced."""
    shown = printable(str(path))
    if path.suffix.lower() != ".csv":
        raise ConfigError(
            f"--write-table {shown}: the table is CSV; give a name that ends in .csv."
        )
    if path.exists():
        raise ConfigError(f"--write-table {shown} exists; give another name, or delete it.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--write-table {shown}: there is no such folder; make it first.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--write-table {shown}: its folder is read-only; give another place.")


def write_table(path: Path, inventory: Inventory, out: frozenset[int]) -> int:
    """Write `path,label,split` of the images that are not in `out`, and return their number. Paths are relative to the
    table's folder, as training reads them; absolute where a link leads to that folder, which `..` would follow.

    Raises DataError when no training image is left, SaveFailed.
    """
    folder = path.absolute().parent
    linked = folder.resolve() != folder
    kept = [row for row in range(len(inventory.labels)) if row not in out]
    if not any(inventory.split_name(row) == "train" for row in kept):
        raise DataError("No training image is left, so no table is written.")
    rows = []
    for row in kept:
        key = inventory.key(row)
        written = os.fsdecode(key if linked else _relative(key, os.fsencode(folder)))
        rows.append((written, inventory.label(row), inventory.split_name(row)))
    write_csv(path, COLUMNS, rows)
    return len(kept)


def _relative(key: bytes, folder: bytes) -> bytes:
    """On another drive of Windows a file has no relative path. A `..` in the key may follow a link: it is resolved."""
    place, name = os.path.split(key)
    if b".." in place.split(os.fsencode(os.sep)):
        key = os.path.join(os.path.realpath(place), name)  # noqa: PTH118 - bytes
    try:
        return os.path.relpath(key, folder)
    except ValueError:
        return key
