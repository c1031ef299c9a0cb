"""From the argument DATA to a listing of its images. Imports neither torch nor PIL."""

from __future__ import annotations

import os
import re

from nearkin.data.sources.builtin import BUILTIN, list_builtin
from nearkin.data.sources.folders import list_folder
from nearkin.data.sources.listing import SPLITS, Listing
from nearkin.data.sources.tables import TABLE_SUFFIXES, list_table
from nearkin.errors import DataError, nearest, printable

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def resolve(data: str) -> Listing:
    """What DATA holds: a built-in name, a folder of class folders, or a table of paths and labels.

    A built-in name wins over a folder of that name; `./NAME` is the folder. Nothing is decoded yet.
    The parts come in the order train, val, test.

    Raises DataError when DATA is missing, empty or of a kind that nearkin does not read.
    """
    listing = list_builtin(data) if data in BUILTIN else _stored(data)
    notes = listing.notes
    if data in BUILTIN and os.path.isdir(data):  # noqa: PTH112
        notes += (f"{data} is the built-in data set; for the folder of that name write ./{data}",)
    parts = {split: listing.parts[split] for split in SPLITS if split in listing.parts}
    return listing._replace(parts=parts, data=data, notes=notes)


def _stored(data: str) -> Listing:
    shown = printable(data)
    if _SCHEME.match(data):
        raise DataError(
            f"{shown} is not a folder or table on this machine: nearkin reads built-in names, folders and tables; "
            "download it and give the folder."
        )
    if "\0" in data or not data or not os.path.exists(data):  # noqa: PTH110 - any bytes may come
        raise DataError(
            f"The data '{shown}' are missing: no such folder or table, and no built-in name "
            f"({', '.join(BUILTIN)}).{nearest(data, BUILTIN)}"
        )
    if os.path.isdir(data):  # noqa: PTH112
        return list_folder(data)
    if not (os.path.isfile(data) and data.lower().endswith(TABLE_SUFFIXES)):  # noqa: PTH113
        raise DataError(
            f"{shown} is neither a folder of class folders nor a table "
            f"({', '.join(TABLE_SUFFIXES)}); unpack archives first."
        )
    return list_table(data)
