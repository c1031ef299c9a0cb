"""nearkin evaluate RUN [DATA]"""

from __future__ import annotations

import json
import sys
from typing import Any

from nearkin.cli import is_first
from nearkin.cli.arguments import Parser, show_help, whole_number
from nearkin.errors import ConfigError, printable

USAGE = "nearkin evaluate RUN [DATA] [--split NAME] [--json]"


def main(argv: list[str]) -> int:
    parser = Parser(USAGE, "Exact metrics of a trained model, on its own data or on DATA.")
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument("data", nargs="?", metavar="DATA", help="[the run's own]")
    parser.add_argument("--split", metavar="NAME", help="train, val or test [test, else val]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.add_argument("--workers", metavar="N", help="processes that load images [0]")
    parser.flag("json", "one JSON object on stdout")
    parser.flag("help", "this help")
    given = parser.read(argv)
    if given.get("help"):
        show_help(parser)
        return 0
    if "run" not in given or given["run"] is None:
        raise ConfigError("Evaluate which run? Give the folder that train printed.")
    from nearkin.evaluation.verbs import evaluate

    result = evaluate(
        given["run"],
        given.get("data"),
        split=given.get("split"),
        device=given.get("device", "auto"),
        workers=whole_number("workers", given.get("workers", "0")),
    )
    if not is_first():
        return 0
    for note in result["notes"]:
        sys.stderr.write(f"note: {printable(note)}\n")
    if given.get("json"):
        record = {"run": result["run"], "test_top1": None} | result
        if result["split"] == "test":
            record["test_top1"] = result["top1"]
        sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")
    else:
        sys.stdout.write(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The metrics as text: totals, then a line per class."""
    lines = [
        f"split      {result['split']} ({result['n']} images)",
        f"top-1      {100 * result['top1']:.2f} %",
        f"top-5      {100 * result['top5']:.2f} %",
        f"log loss   {result['log_loss']:.4f}",
        f"ECE        {100 * result['ece']:.2f} %",
        "",
        f"{'class':<24} {'precision':>9} {'recall':>9} {'F1':>9} {'images':>7}",
    ]
    rows = [
        *result["per_class"],
        {"class": "macro mean", "support": result["n"], **result["macro"]},
    ]
    for row in rows:
        values = " ".join(f"{100 * row[key]:8.2f}%" for key in ("precision", "recall", "f1"))
        lines.append(f"{printable(row['class']):<24.24} {values} {row['support']:>7}")
    lines += ["", "confusion matrix (rows: true class, columns: predicted)"]
    width = max(len(str(value)) for row in result["confusion"] for value in row) + 1
    for row in result["confusion"]:
        lines.append("".join(f"{value:>{width}}" for value in row))
    return "\n".join(lines) + "\n"
