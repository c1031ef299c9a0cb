"""The folder of contact sheets: which names are ours. Imports neither torch nor PIL."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nearkin.errors import ConfigError, printable
from nearkin.files import write_atomic

LIST = ".nearkin-sheets.json"  # the names of the sheets, written before the first of them
NAME = re.compile(r"\d+(-[A-Za-z0-9_.-]+)?\.jpg")
LONGEST = 60  # characters of a file's name in that of its sheet


def sheet_names(files: Sequence[str]) -> list[str]:
    """A safe name for the sheet of each file, in order: its place, then what is plain in its name."""
    width = len(str(len(files)))
    names = []
    for place, file in enumerate(files, 1):
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(file).stem)[:LONGEST].strip("._-")
        names.append(f"{place:0{width}d}{plain and '-'}{plain}.jpg")
    return names


def check_folder(folder: Path) -> list[str]:
    """The sheets of an earlier call in `folder`. Raises ConfigError unless it is missing, empty or such a folder."""
    shown = printable(str(folder))
    try:
        inside = sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"--explain {shown} is no folder: {error.strerror}.") from None
    if not inside:
        return []
    try:
        names = json.loads((folder / LIST).read_text(encoding="utf-8"))
        earlier = [name for name in names if NAME.fullmatch(name)]
    except (OSError, ValueError, TypeError, RecursionError):
        raise ConfigError(
            f"--explain {shown} holds other files, such as {printable(inside[0])}; give a new or an empty folder."
        ) from None
    return earlier


def without_sheets(files: Sequence[str], folder: Path) -> list[str]:
    """`files` but for the sheets of an earlier call in `folder`, which `open_folder` deletes."""
    earlier = {os.path.realpath(folder / name) for name in check_folder(folder)}
    return [file for file in files if not earlier or os.path.realpath(file) not in earlier]


def open_folder(folder: Path, names: Sequence[str]) -> None:
    """Make `folder`, or delete the sheets of an earlier call in it, and note the `names` of the new ones.

    Raises ConfigError as `check_folder`, and where another file has the name of a sheet; SaveFailed.
    """
    from nearkin.files import reporting

    earlier = check_folder(folder)
    taken = [n for n in sorted(set(names) - set(earlier)) if os.path.lexists(folder / n)]
    if taken:
        raise ConfigError(
            f"--explain {printable(str(folder))} holds another file {taken[0]}; give a new folder."
        )
    with reporting(f"The folder {printable(str(folder))} could not be prepared"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in earlier:
            (folder / name).unlink(missing_ok=True)
    write_atomic(folder / LIST, json.dumps(list(names)).encode())
