"""Predictions as CSV, JSON, JSON lines or Parquet, on stdout or in a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from nearkin.errors import ConfigError, printable, to_install
from nearkin.evaluation.options import check_choice
from nearkin.evaluation.results import Prediction
from nearkin.files import csv_line, replacing

Format = Literal["csv", "json", "jsonl", "parquet"]
# New columns come last, so that those of earlier versions keep their places.
COLUMNS = ("path", "class", "probability", "top5", "error", "unlike", "kin", "guess", "set")
GROUP = 10_000  # rows of a group in Parquet, which are kept in memory


def choose_format(given: dict[str, Any]) -> tuple[str, Path | None]:
    """The format and the file of --format, --json and --out: by default what the name of the file ends in, else CSV.

    Raises ConfigError for another format, a file that cannot be one, and Parquet without a file or without pyarrow.
    """
    out = Path(given["out"]) if given.get("out") is not None else None
    chosen: str | None = given.get("format")
    if given.get("json"):
        if chosen not in (None, "json"):
            raise ConfigError(f"--json and --format {printable(chosen)} differ; give one of them.")
        chosen = "json"
    if chosen is None:
        chosen = "csv" if out is None else out.suffix.lower().removeprefix(".")
        if chosen not in get_args(Format):
            raise ConfigError(
                f"--out {printable(str(out))} says no format; end it in .csv, .json, .jsonl or .parquet, or give "
                "--format."
            )
    check_choice("format", chosen, Format)
    check_out(out)
    if chosen == "parquet":
        if out is None:
            raise ConfigError("--format parquet needs a file: --out FILE.")
        check_pyarrow()
    return chosen, out


def check_out(out: Path | None) -> None:
    """Raises ConfigError when `out` is no regular file, or cannot be written in its folder."""
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"--out {printable(str(out))} is a folder; give the name of a file.")
    if out.exists() and not out.is_file():  # a pipe or a device would be replaced by a file
        raise ConfigError(f"--out {printable(str(out))} is no regular file; give another name.")
    if not out.parent.is_dir():
        raise ConfigError(f"The folder of --out {printable(str(out))} does not exist; make it.")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(
            f"The folder of --out {printable(str(out))} cannot be written; choose another one."
        )


def check_pyarrow() -> None:
    """Raises ConfigError where Parquet cannot be written."""
    if find_spec("pyarrow") is None:
        raise ConfigError(f"Parquet needs pyarrow; {to_install('parquet')}.")


def write_rows(predictions: Iterable[Prediction], run: str, chosen: str, out: Path | None) -> None:
    """Write all predictions as they come: to stdout, or to `out`, whole or not at all. Of JSON all are kept in memory.

    Raises SaveFailed.
    """
    pieces = {"csv": _csv, "jsonl": _json_lines}.get(chosen, _json)(predictions, run)
    if out is None:
        for piece in pieces:
            sys.stdout.write(piece)
        return
    with replacing(out) as file:
        if chosen == "parquet":
            _parquet(predictions, file)
            return
        for piece in pieces:
            file.write(piece.encode("utf-8", "surrogateescape"))


def _csv(predictions: Iterable[Prediction], _: str) -> Iterator[str]:
    yield csv_line(COLUMNS)
    for one in predictions:
        kin = [[near.path, near.label, round(near.similarity, 6)] for near in one.kin]
        yield csv_line(
            (
                one.path,
                one.label or "",
                "" if one.probability is None else f"{one.probability:.6f}",
                _cell([[name, round(p, 6)] for name, p in one.top5]),
                one.error or "",
                "" if one.unlike is None else f"{one.unlike:.6f}",
                _cell(kin),
                one.guess or "",
                _cell(list(one.set or ())),
            )
        )


def _cell(values: list[Any]) -> str:
    return json.dumps(values) if values else ""


def _json(predictions: Iterable[Prediction], run: str) -> Iterator[str]:
    rows = [one.to_dict() for one in predictions]
    record = {"run": run, "test_top1": None, "predictions": rows}
    yield json.dumps(record, allow_nan=False) + "\n"


def _json_lines(predictions: Iterable[Prediction], _: str) -> Iterator[str]:
    for one in predictions:
        yield json.dumps(one.to_dict(), allow_nan=False) + "\n"


def _parquet(predictions: Iterable[Prediction], file: BinaryIO) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    pair = [("class", pa.string()), ("probability", pa.float64())]
    near = [("path", pa.string()), ("class", pa.string()), ("similarity", pa.float64())]
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("class", pa.string()),
            ("probability", pa.float64()),
            ("top5", pa.list_(pa.struct(pair))),
            ("error", pa.string()),
            ("unlike", pa.float64()),
            ("kin", pa.list_(pa.struct(near))),
            ("guess", pa.string()),
            ("set", pa.list_(pa.string())),
        ]
    )
    rows = (valid_text(one.to_dict()) for one in predictions)
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def valid_text(value: Any) -> Any:
    """`value` with every text in it valid UTF-8, as Parquet needs: other bytes of file names as `\\xe9`."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {name: valid_text(part) for name, part in value.items()}
    return [valid_text(part) for part in value] if isinstance(value, list) else value
