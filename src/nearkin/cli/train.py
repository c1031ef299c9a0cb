"""nearkin train [DATA]"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nearkin.catalogue import check_objective, recipe_or_file
from nearkin.cli import show
from nearkin.cli.arguments import Parser, options_table
from nearkin.config import FREE, RunConfig, merge, read_yaml, to_yaml, validate
from nearkin.errors import ConfigError, counted, printable
from nearkin.evaluation.results import wilson
from nearkin.process import keep_freed_memory
from nearkin.training.api import Result, continue_run, resolved, start_run
from nearkin.training.run_folder import REPORT, stored_options, stored_settings

USAGE = "nearkin train [DATA] [--objective NAME] [--objective.OPTION VALUE] [--model.OPTION VALUE] [--OPTION VALUE]"
ABOUT = """\
Train an image classifier; without DATA, on the built-in digits.
With --objective NAME, --help shows its options as well."""


def main(given: dict[str, Any]) -> int:
    keep_freed_memory()
    given = with_data(given)
    as_json, quiet = given.pop("json", False), given.pop("quiet", False)
    report = given.pop("report", True)
    print_config, resume = given.pop("print_config", False), given.pop("resume", None)
    values = merge(*(read_yaml(recipe_or_file(name)) for name in given.pop("config", [])), given)
    if print_config:
        sys.stdout.write(_shown(values, resume))
    elif resume is None:
        _report(start_run(values, quiet=quiet, report=report), as_json)
    else:
        _report(continue_run(Path(resume), values, quiet=quiet, report=report), as_json)
    return 0


def _shown(values: dict[str, Any], resume: str | None) -> str:
    """The settings as YAML, below the options that were given as comments."""
    if resume is None:
        settings, given = resolved(values), validate(RunConfig, values)
    else:
        settings, given = stored_settings(Path(resume)), stored_options(Path(resume))
    lines = to_yaml(given, given=True).splitlines()
    return "".join(f"# {line}\n" for line in ["given:", *lines]) + to_yaml(settings)


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT, _objective_help, free=True)
    parser.add_argument("word", nargs="?", metavar="DATA", help="what to learn from [digits]")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="FILE",
        help="options in YAML, or a recipe's name",
    )
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.flag("print-config", "print the resolved options and stop")
    parser.flag("report", "write report.html, a page to look at, into the run folder [true]")
    parser.flag("json", "the result as one JSON object on stdout")
    parser.flag("quiet", "nothing on stderr but errors")
    parser.options(RunConfig, without=frozenset(FREE.values()))
    return parser


def with_data(given: dict[str, Any]) -> dict[str, Any]:
    """The options, with DATA as `data` whether it was given as a word or as --data."""
    if "word" not in given:
        return given
    word = given.pop("word")
    if "data" in given:
        raise ConfigError(
            f"DATA is given twice, as {printable(word)} and as --data {printable(given['data'])}; give it once."
        )
    return given | {"data": word}


def _objective_help(given: dict[str, Any]) -> str:
    name = given.get("objective")
    if name is None:
        return ""
    check_objective(name)
    from nearkin.objectives import get

    return f"\noptions of the objective {name}:\n" + options_table(get(name).Config, "objective.")


def _report(result: Result, as_json: bool) -> None:
    run = printable(str(result.run))
    page = result.run / REPORT
    lines = [
        *_accuracy(result.metrics),
        f"run {run}",
        *([f"page {printable(str(page))}"] if page.is_file() else []),
        f"next: nearkin predict {shlex.quote(run)} PHOTOS",
    ]
    show(result.to_dict(), "\n".join(lines) + "\n", as_json=as_json)


def _accuracy(metrics: dict[str, Any]) -> Iterator[str]:
    if not metrics:
        yield "neither a test nor a validation split"
        return
    split, count = metrics["split"], metrics["n"]
    low, high = (100 * end for end in wilson(metrics["top1"], count))
    text = (
        f"{split} top-1 {100 * metrics['top1']:.2f} % (95 % interval {low:.1f} to {high:.1f} %, "
        f"{counted(count, 'image')})"
    )
    if split == "val":
        text += "; there is no test split, and the model was chosen by this one"
    yield text
    worst = metrics.get("most_confused")
    if worst is not None:
        true, predicted = printable(worst["true"]), printable(worst["predicted"])
        yield f"most often confused: {true}, taken for {predicted} ({counted(worst['images'], 'image')})"
