"""A table of paths and labels: CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nearkin.data.sources.listing import (
    SPLIT_NAMES,
    SPLITS,
    FileList,
    ListedSplit,
    Listing,
    class_places,
)
from nearkin.errors import DataError, counted, listed, printable, to_install

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
COLUMNS = ("path", "label", "split")
MARKED = {*COLUMNS, "mark", "correct"}  # the columns of the marks that a report saves
LONGEST_LINE = 2**20
QUOTED = re.compile(r"\s+\".*\"\s*", re.DOTALL)


class _Row(NamedTuple):
    where: str  # for errors: "line 3"
    path: str
    label: str
    split: str


def list_table(path: str) -> Listing:
    """The images that a table names, in its order.

    Columns: path (relative to the table's folder), label, and optionally split (a name of `SPLIT_NAMES`, in any
    case); other columns are ignored, and noted. Spaces around labels and splits do not count. CSV and TSV are UTF-8
    with a header line; a byte order mark and any line ends are fine; bytes that are not UTF-8 in names are kept.

    Raises DataError, naming the line, for a missing header or value, a wrong number of fields, an unknown
    split, a file that does not exist, and a file that is named twice.
    """
    try:
        rows, header = _parquet(path) if path.lower().endswith(".parquet") else _text(path)
    except OSError as error:
        reason = printable(" ".join((error.strerror or str(error)).lower().split()))[:100]
        raise DataError(f"The table {printable(path)} cannot be read: {reason}.") from None
    if "mark" in header and set(header) <= MARKED:
        raise DataError(
            f"{printable(path)} lists marks, not images to train on; give `nearkin doctor DATA --marks "
            f"{printable(path)} --write-table clean.csv`, then train clean.csv."
        )
    root = os.path.dirname(path)  # noqa: PTH120 - a Path would normalise it
    _check_files(path, root, rows)
    by_split = {split: [row for row in rows if row.split == split] for split in SPLITS}
    parts = {
        split: ListedSplit(
            FileList.pack(root, (os.fsencode(row.path) for row in found)),
            *class_places([row.label for row in found]),
        )
        for split, found in by_split.items()
        if found
    }
    if not parts:
        raise DataError(f"The table {printable(path)} names no images; give one in each line.")
    extra = [name for name in header if name not in COLUMNS]
    notes = (f"columns ignored in the table: {listed(extra)}",) if extra else ()
    return Listing(Path(path).stem, parts, notes)


def _fail(path: str, where: str, what: str) -> DataError:
    return DataError(f"{printable(path)}, {where}: {what}.")


def _text(path: str) -> tuple[list[_Row], list[str]]:
    lines = text_table(path)
    where, header = next(lines)
    places = _places(path, where, header)
    return [_row(path, where, fields, places) for where, fields in lines], header


def text_table(path: str) -> Iterator[tuple[str, list[str]]]:
    """Where it is and the fields of each line of a CSV or TSV that is not empty. The first is the header, in lower
    case; there is one though the file is empty. Raises DataError, naming the line, and OSError."""
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    # File names may be any bytes; `surrogateescape` keeps those that are not UTF-8.
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        with Path(path).open("rb") as raw:
            start = raw.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
            raise DataError(
                f"The table {printable(path)} is in UTF-16 or UTF-32; save it as UTF-8."
            )
        reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            yield "line 1", header
            for fields in filter(None, reader):
                where = f"line {reader.line_num}"
                if len(fields) != len(header):
                    what = f"{counted(len(fields), 'field')} instead of {len(header)}"
                    raise _fail(path, where, what)
                if any(QUOTED.fullmatch(field) for field in fields):
                    what = "there is a space before a quotation mark; leave it out"
                    raise _fail(path, where, what)
                yield where, fields
        except csv.Error as error:
            raise _fail(path, f"line {reader.line_num}", f"not valid CSV, {error}") from None


def _lines(path: str, file: Any) -> Iterator[str]:
    """Lines of bounded length, so that one endless line cannot fill the memory."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise _fail(path, f"line {number}", "it is longer than a million characters")
        yield line


def _places(path: str, where: str, header: Sequence[str]) -> dict[str, int]:
    """Column -> its place. Raises DataError when `path` or `label` is missing or a column comes twice."""
    for name in sorted(COLUMNS):
        if header.count(name) > 1:
            raise _fail(path, where, f"the column {name} occurs twice")
    if "path" not in header or "label" not in header:
        what = "there must be a header with the columns path,label[,split]"
        if len(header) == 1 and ";" in header[0]:
            what += "; here they are separated by semicolons, save the table with commas"
        elif any(name.startswith('"') for name in header):
            what += "; leave out the space before a quotation mark"
        raise _fail(path, where, what)
    return {name: header.index(name) for name in COLUMNS if name in header}


def _row(path: str, where: str, fields: list[str], places: dict[str, int]) -> _Row:
    values = {name: fields[place] for name, place in places.items()}
    for name in COLUMNS[:2]:
        if not values[name].strip():
            raise _fail(path, where, f"the {name} is empty")
    given = values.get("split", "train")
    split = SPLIT_NAMES.get(given.strip().lower())
    if split is None:
        raise _fail(
            path, where, f"the split '{printable(given)}' is none of {', '.join(SPLIT_NAMES)}"
        )
    label = _label(path, where, values)
    return _Row(where, values["path"], sys.intern(label), split)  # labels repeat


def _label(path: str, where: str, values: dict[str, str]) -> str:
    """Without spaces around it, and UTF-8, unless it is the name of a folder on the image's path."""
    given = values["label"]
    label = given.strip()
    if (label == given and label.isascii()) or given in Path(values["path"]).parts:
        return given
    try:
        label.encode()
    except UnicodeEncodeError:
        what = f"the label {printable(label)} is not in UTF-8; save the table as UTF-8"
        raise _fail(path, where, what) from None
    return label


def _parquet(path: str) -> tuple[list[_Row], list[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"Reading {printable(path)} needs pyarrow; {to_install('parquet')}."
        ) from None
    try:
        names = parquet.read_schema(path).names
        header = [name.strip().lower() for name in names]
        places = _places(path, "schema", header)
        wanted = [names[place] for place in places.values()]
        table = parquet.read_table(path, columns=wanted)
        columns = [table.column(name).to_pylist() for name in wanted]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        text = printable(" ".join(str(error).split()))[:100]
        raise DataError(f"The table {printable(path)} cannot be read: {text}.") from None
    order = {name: place for place, name in enumerate(places)}
    rows = [
        _row(path, f"row {number}", _strings(path, f"row {number}", fields), order)
        for number, fields in enumerate(zip(*columns, strict=True), start=1)
    ]
    return rows, header


def _strings(path: str, where: str, fields: Sequence[Any]) -> list[str]:
    """Text as it is and whole numbers written out, since labels are often numbers, which pandas stores as 3.0 where
    some are missing. A null is empty."""
    texts = []
    for field in fields:
        if isinstance(field, float) and field.is_integer():
            field = int(field)
        if not isinstance(field, str | int | None):
            raise _fail(
                path, where, f"a {type(field).__name__} instead of a text or a whole number"
            )
        texts.append("" if field is None else str(field))
    return texts


def _check_files(path: str, root: str, rows: Sequence[_Row]) -> None:
    """Raises DataError when a file is missing or named twice."""
    first: dict[str, _Row] = {}
    for row in rows:
        file = os.path.join(root, row.path)  # noqa: PTH118
        earlier = first.setdefault(os.path.abspath(file), row)  # noqa: PTH100 - any bytes
        if earlier is not row:
            same = earlier.label == row.label
            labels = f"{printable(earlier.label)} and {printable(row.label)}"
            what = "named twice" if same else f"labelled both {labels}"
            lines = f"{earlier.where} and {row.where}"
            raise _fail(path, lines, f"{printable(row.path)} is {what}; keep one of the two")
        if "\0" in file or not os.path.exists(file):  # noqa: PTH110
            raise _fail(path, row.where, f"the file {printable(row.path)} does not exist")
