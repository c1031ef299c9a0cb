"""Findings about a data set, and the table of the files that they concern. Imports neither torch nor PIL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nearkin.errors import ConfigError, counted, printable
from nearkin.files import write_csv

Level = Literal["ok", "warning", "error"]
FILE = "doctor.csv"
COLUMNS = ("path", "label", "split", "level", "finding", "detail")


class Concerned(NamedTuple):
    """One file of a finding. path: as it is opened; the name of an image that is no file. detail: may be empty."""

    path: str
    label: str
    split: str
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing about a data set.

    level: `error` where training would stop or its test accuracy would be wrong, `warning` where a person should act
    or decide, else `ok`. code: the kind of finding, e.g. `exact-copies`. text: one sentence, with what to do.
    files: all that it concerns.
    """

    level: Level
    code: str
    text: str
    files: tuple[Concerned, ...] = ()

    def line(self) -> str:
        """The finding on one line."""
        return f"{self.level:<8} {self.code:<18} {printable(self.text)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; of the files their number, since `doctor.csv` lists them."""
        return {"level": self.level, "code": self.code, "text": self.text, "files": len(self.files)}


def count(findings: Sequence[Finding], level: Level) -> int:
    """How many findings have this level."""
    return sum(finding.level == level for finding in findings)


def check_target(folder: Path) -> Path:
    """The path of `doctor.csv` in `folder`. Raises ConfigError where it cannot be written there, or a file of that
    name is not one of ours."""
    path = folder / FILE
    shown = printable(str(path))
    if not folder.is_dir():
        raise ConfigError(f"--out {printable(str(folder))} is no folder; make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{shown} cannot be written: its folder is read-only; give another folder with --out."
        )
    try:
        with path.open("rb") as file:
            first = file.readline(200).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise ConfigError(
            f"{shown} cannot be replaced ({error.strerror}); give another --out."
        ) from None
    if first != ",".join(COLUMNS):
        raise ConfigError(
            f"{shown} exists and was not written by nearkin doctor; move it, or give another folder with --out."
        )
    return path


def concerned(findings: Sequence[Finding]) -> int:
    """The number of rows that `write_findings` writes."""
    return sum(len(finding.files) for finding in findings)


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write a row for each file of each finding. Without any row nothing is written, unless there is a file of an
    earlier time to replace. Raises SaveFailed."""
    rows = [
        (file.path, file.label, file.split, finding.level, finding.code, file.detail)
        for finding in findings
        for file in finding.files
    ]
    if rows or path.exists():
        write_csv(path, COLUMNS, rows)


def summary(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings`."""
    errors, warnings = count(findings, "error"), count(findings, "warning")
    return f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
