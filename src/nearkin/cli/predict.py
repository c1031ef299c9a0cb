"""nearkin predict RUN IMAGES..."""

from __future__ import annotations

import csv
import json
import sys
from typing import TYPE_CHECKING, Any

from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nearkin.evaluation.results import Prediction

USAGE = "nearkin predict RUN IMAGES... [--tta NAME] [--json]"
COLUMNS = ("path", "class", "probability", "top5", "error")


def parser() -> Parser:
    parser = Parser(USAGE, "The class of each image, as CSV on stdout; folders are searched.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument("images", nargs="*", metavar="IMAGES", help="image files and folders")
    parser.add_argument("--tta", metavar="NAME", help="views: none, flip or tencrop [none]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.flag("json", "one JSON object on stdout instead of CSV")
    return parser


def main(given: dict[str, Any]) -> int:
    if not given.get("run") or not given.get("images"):
        raise ConfigError("Predict what? Give a run folder, then image files or folders.")
    from nearkin.evaluation.predict import check_arguments, find_files, predict

    run, tta, device = given["run"], given.get("tta", "none"), given.get("device", "auto")
    check_arguments(run, tta, device)  # before a folder of many images is searched
    files, notes = find_files(given["images"])
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    predictions = predict(run, files, tta=tta, device=device)
    if given.get("json"):
        rows = [one.to_dict() for one in predictions]
        record = {"run": run, "test_top1": None, "predictions": rows}
        sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")
        bad = sum(row["error"] is not None for row in rows)
    else:
        bad = _write_csv(predictions)
    if bad:
        sys.stdout.flush()
        raise DataError(f"{bad} of {len(files)} files could not be read; their rows say why.")
    return 0


def _write_csv(predictions: Iterator[Prediction]) -> int:
    """Writes a row per file, as soon as it is known, and returns how many files could not be read."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    bad = 0
    for one in predictions:
        top5 = json.dumps([[name, round(p, 6)] for name, p in one.top5]) if one.top5 else ""
        probability = "" if one.probability is None else f"{one.probability:.6f}"
        writer.writerow([one.path, one.label or "", probability, top5, one.error or ""])
        bad += one.error is not None
    return bad
