"""nearkin evaluate RUN [DATA]"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser, whole_number
from nearkin.errors import ConfigError, printable

if TYPE_CHECKING:
    from nearkin.evaluation.results import Evaluation

USAGE = "nearkin evaluate RUN... [DATA] [--split NAME] [--tta NAME] [--weights NAME] [--json]"

MARKS = ("model.json", "status.json")  # an unfinished run is a RUN, too, and gives an error
KEPT = "not run again: its predictions were kept (--no-cache runs it)"
SHOWN = 20  # classes up to which everything is shown, and lines shown of more


def parser() -> Parser:
    parser = Parser(
        USAGE,
        "Exact metrics of a trained model, on its own data or on DATA; of several runs as an ensemble.\n"
        "Every run folder is a RUN; one other word may be DATA.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN... [DATA]", help="folders that train printed"
    )
    parser.add_argument("--split", metavar="NAME", help="train, val or test [test, else val]")
    parser.add_argument("--tta", metavar="NAME", help="views: none, flip or tencrop [none]")
    parser.add_argument(
        "--weights", metavar="NAME", help="of an ensemble: equal, or by validation [equal]"
    )
    parser.flag("cache", "store the probabilities in the run folder [true]")
    parser.add_argument(
        "--bad-images",
        dest="bad_images",
        metavar="NAME",
        help="unreadable images: error stops, skip leaves them out [as in the training]",
    )
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.add_argument("--workers", metavar="N", help="processes that load images [auto]")
    parser.flag("json", "one JSON object on stdout")
    return parser


def main(given: dict[str, Any]) -> int:
    runs, data = _runs_and_data(given.get("runs") or [])
    from nearkin.evaluation.evaluate import evaluate

    workers = given.get("workers", "auto")

    result = evaluate(
        runs,
        data,
        split=given.get("split"),
        tta=given.get("tta", "none"),
        weights=given.get("weights", "equal"),
        cache=given.get("cache", True),
        device=given.get("device", "auto"),
        workers="auto" if workers == "auto" else whole_number("workers", workers),
        bad_images=given.get("bad_images"),
    )
    record = result.to_dict() | {"test_top1": result.top1 if result.split == "test" else None}
    show(record, table(result), as_json=given.get("json", False), notes=result.notes)
    return 0


def _runs_and_data(words: list[str]) -> tuple[list[str], str | None]:
    """Every run folder among the words is a RUN; one other word may be DATA. A single word is always a RUN."""
    if not words:
        raise ConfigError("Evaluate which run? Give the folder that train printed.")
    runs = [word for word in words if any((Path(word) / name).is_file() for name in MARKS)]
    others = [word for word in words if word not in runs]
    if len(others) > 1 and runs:
        raise ConfigError(
            f"{printable(others[0])} and {printable(others[1])} are no run folders (no model.json), and only "
            "one word can be DATA; give the folders that train printed."
        )
    if not runs:  # evaluate will report that the first is no run folder
        return words[:1], None
    return runs, others[0] if others else None


def table(result: Evaluation) -> str:
    """The metrics as text: totals, a line per class, the confusion matrix. Of many classes only the worst are shown."""
    low, high = result.interval
    lines = [
        *_members(result),
        f"split      {result.split} ({result.n} images)",
        f"top-1      {100 * result.top1:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)",
        f"top-5      {100 * result.top5:.2f} %",
        f"log loss   {result.log_loss:.4f}",
        f"ECE        {100 * result.ece:.2f} %",
        "",
        *_classes(result),
        "",
        *(_matrix(result) if len(result.per_class) <= SHOWN else _confused(result)),
    ]
    files = [printable(str(file)) for file in (result.classes_file, result.confusion_file) if file]
    if files:
        lines += ["", f"in full: {', '.join(files)}"]
    return "\n".join(lines) + "\n"


def _classes(result: Evaluation) -> list[str]:
    rows, title = list(result.per_class), "class"
    if len(rows) > SHOWN:
        title = "class (lowest F1)"
        rows = sorted((row for row in rows if row.support), key=lambda row: row.f1)[:SHOWN]
    lines = [f"{title:<24} {'precision':>9} {'recall':>9} {'F1':>9} {'images':>7}"]
    for name, *values, support in (*rows, ("macro mean", *result.macro, result.n)):
        shown = " ".join(f"{100 * value:8.2f}%" for value in values)
        lines.append(f"{printable(name):<24.24} {shown} {support:>7}")
    return lines


def _matrix(result: Evaluation) -> list[str]:
    counts = {(row.true, row.predicted): row.images for row in result.confusion}
    names = [row.name for row in result.per_class]
    width = max(len(str(count)) for count in counts.values()) + 1
    lines = ["confusion matrix (rows: true class, columns: predicted)"]
    for true in names:
        row = (counts.get((true, predicted), 0) for predicted in names)
        lines.append("".join(f"{count:>{width}}" for count in row))
    return lines


def _confused(result: Evaluation) -> list[str]:
    wrong = [row for row in result.confusion if row.true != row.predicted]
    lines = [f"{'most confused: true class':<25} {'predicted':<24} {'images':>7}"]
    for row in sorted(wrong, key=lambda row: -row.images)[:SHOWN]:
        true, predicted = printable(row.true), printable(row.predicted)
        lines.append(f"{true:<24.24}  {predicted:<24.24} {row.images:>7}")
    return lines


def _members(result: Evaluation) -> list[str]:
    """A line per model: its own top-1, its weight in an ensemble, and whether it had to be run."""
    if len(result.members) == 1:
        return [f"model      {KEPT}"] if result.members[0].cached else []
    width = max(len(printable(member.run)) for member in result.members)
    lines = [f"{'model':<{width}} {'weight':>7} {'top-1':>8}"]
    for member in result.members:
        kept = f"  {KEPT}" if member.cached else ""
        lines.append(
            f"{printable(member.run):<{width}} {member.weight:>7.3f} {100 * member.top1:>6.2f} %{kept}"
        )
    return [*lines, ""]
