"""Validation accuracy against time: `python -m benchmarks.time_to_accuracy RUN... --plot FILE`.

Reads `metrics.jsonl` of finished runs; time includes validation.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.bench import output
from nearkin.config import read_yaml
from nearkin.training.metrics_log import METRICS, read_metrics

STYLES = {"ce": ("#0072B2", "o"), "supcon": ("#D55E00", "s"), "cone": ("#009E73", "^")}
OTHER = ("#CC79A7", "D")
SHARES = (0.9, 0.95, 1.0)  # of the lowest final accuracy of all runs


def curve(run: Path) -> dict[str, Any]:
    """seconds and top1 after each epoch of one run, from the first record on."""
    records = read_metrics(run / METRICS)
    start = _time(records[0]) - records[0]["clock"]["seconds"]
    judged = [r for r in records if r["kind"] == "validation" and "top1" in r]
    if not judged:
        raise SystemExit(f"The run {run} has no validation accuracy.")
    options = read_yaml(run / "config.yaml")
    return {
        "run": run.name,
        "objective": options["objective"],
        "seed": options["seed"],
        "seconds": [_time(r) - start for r in judged],
        "top1": [r["top1"] for r in judged],
    }


def _time(record: dict[str, Any]) -> float:
    return datetime.fromisoformat(record["clock"]["time"]).timestamp()


def reached(curve: dict[str, Any], accuracy: float) -> float | None:
    """Seconds until the accuracy is reached, or None."""
    pairs = zip(curve["seconds"], curve["top1"], strict=True)
    return next((seconds for seconds, top1 in pairs if top1 >= accuracy), None)


def show(curves: list[dict[str, Any]]) -> str:
    """Seconds of each run to three accuracies that all of them reach."""
    least = min(max(each["top1"]) for each in curves)
    goals = [share * least for share in SHARES]
    lines = ["run                              best   " + "".join(f"{g:>12.1%}" for g in goals)]
    for each in curves:
        times = "".join(f"{reached(each, goal):>10.0f} s" for goal in goals)
        lines.append(f"{each['run']:<30} {max(each['top1']):>7.1%}  {times}")
    return "\n".join(lines)


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against time, a line for each run, a colour for each objective."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "time", "font.size": 9}):
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        panel = figure.subplots()
        named: set[str] = set()
        for each in curves:
            colour, marker = STYLES.get(each["objective"], OTHER)
            label = None if each["objective"] in named else each["objective"]
            named.add(each["objective"])
            accuracy = [100 * top1 for top1 in each["top1"]]
            panel.plot(each["seconds"], accuracy, color=colour, marker=marker, ms=3, label=label)
        panel.set(xlabel="seconds of training", ylabel="validation top-1 (%)")
        panel.grid(visible=True, linewidth=0.4, alpha=0.6)
        panel.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_accuracy")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=output, help="write the curves here")
    parser.add_argument("--plot", type=output, help="draw them here, as SVG (--group bench)")
    given = parser.parse_args()
    curves = [curve(run) for run in given.runs]
    print(show(curves))
    if given.json:
        given.json.write_text(json.dumps(curves, indent=1) + "\n")
    if given.plot:
        draw(curves, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
