"""The page of several runs: a table, paired differences from the first, and curves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nearkin.errors import counted
from nearkin.evaluation.results import wilson
from nearkin.report import svg
from nearkin.report.axes import sample, shown
from nearkin.report.browser import plain
from nearkin.report.page import MISSING, Picture, render
from nearkin.report.run import Facts
from nearkin.report.words import Difference, Image, difference, validations


class Finished(NamedTuple):
    """A run and the totals of its evaluation, as in model.json; empty where it had no split for it."""

    facts: Facts
    metrics: Mapping[str, Any]


def runs_page(runs: Sequence[Finished]) -> str:
    """One HTML file without scripts. The first run is what the others are compared with."""
    runs, place = _named(runs)
    first, *others = runs
    found = [_difference(each.facts, first.facts) for each in others]
    return render(
        "runs.html",
        first=first.facts.run,
        place=place,
        headline=_headline(runs, found),
        rows=[
            _row(first, None, "", 0),
            *(
                _row(each, one, "" if one is None else _common(each, first, one), style)
                for style, (each, one) in enumerate(zip(others, found, strict=True), start=1)
            ),
        ],
        intervals=_intervals(first, others, found),
        curves=_curves(runs),
        options=_options(runs),
        names=[each.facts.run for each in runs],
    )


def _named(runs: Sequence[Finished]) -> tuple[list[Finished], str]:
    """The runs without the folder in which all of them are, and that folder, empty where there is none."""
    names = [each.facts.run for each in runs]
    try:
        place = os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120
    except ValueError:  # of absolute and relative paths
        place = ""
    if place:
        names = [os.path.relpath(name, place) for name in names]
    return [
        each._replace(facts=each.facts._replace(run=name))
        for each, name in zip(runs, names, strict=True)
    ], place


def _difference(mine: Facts, other: Facts) -> Difference | None:
    """On images of equal names and labels; where the runs had other data, of equal paths."""
    if mine.images is not None and mine.images == other.images:
        return difference(mine.right, other.right)
    return difference(_by_path(mine), _by_path(other))


def _by_path(facts: Facts) -> dict[Image, bool]:
    def whole(name: str) -> str:
        return os.path.abspath(os.path.join(facts.root, name))  # noqa: PTH100, PTH118 - without links

    return {(whole(name), label): hit for (name, label), hit in facts.right.items()}


def _headline(runs: Sequence[Finished], found: Sequence[Difference | None]) -> list[str]:
    first = runs[0].facts.run
    sentences = []
    for each, one in zip(runs[1:], found, strict=True):
        if one is None:
            sentences.append(
                f"{each.facts.run} and {first} have no evaluated image in common, by path and label."
            )
            continue
        low, high = (shown(100 * end, 1, sign=True) for end in (one.low, one.high))
        by = shown(100 * one.value, 1, sign=True)
        text = (
            "is not shown to differ from"
            if one.verdict == "undecided"
            else f"is {one.verdict} than"
        )
        common = _common(each, runs[0], one)
        sentences.append(
            f"{each.facts.run} {text} {first}{common and ' ' + common}: {by} points (95 % interval {low} to {high})."
        )
    return sentences


def _common(mine: Finished, other: Finished, found: Difference) -> str:
    """How many images are compared, where those are not all of both runs."""
    if found.images == len(mine.facts.right) == len(other.facts.right):
        return ""
    return f"on the {counted(found.images, 'image')} that both have"


def _row(each: Finished, found: Difference | None, common: str, style: int) -> dict[str, Any]:
    metrics, facts = each.metrics, each.facts
    count = int(metrics.get("n", 0))
    ends = wilson(metrics["top1"], count) if count else (0.0, 0.0)
    low, high = (shown(100 * end, 1) for end in ends)
    row = {
        "run": facts.run,
        "sample": sample(style),
        "objective": str(facts.options.get("objective")),
        "model": str(facts.options.get("model")),
        "top1": shown(100 * metrics["top1"], 2) if count else MISSING,
        "interval": f"{low} to {high}" if count else "",
        "images": f"{count} {metrics['split']}" if count else MISSING,
        "log_loss": shown(metrics["log_loss"], 3) if count else MISSING,
        "difference": MISSING,
        "ends": "",
        "alone": MISSING,
        "p": MISSING,
    }
    if found is None:
        return row
    low, high = (shown(100 * end, 2, sign=True) for end in (found.low, found.high))
    return row | {
        "difference": shown(100 * found.value, 2, sign=True),
        "ends": f"{low} to {high}{common and ', ' + common}",
        "alone": f"{found.better} / {found.worse}",
        "p": "< 0.001" if found.p < 0.001 else shown(found.p, 3),
    }


def _intervals(
    first: Finished, others: Sequence[Finished], found: Sequence[Difference | None]
) -> Picture | None:
    rows = []
    for style, (each, one) in enumerate(zip(others, found, strict=True), start=1):
        if one is not None:
            value, low, high = (100 * end for end in (one.value, one.low, one.high))
            text = f"{shown(value, 2, sign=True)} ({shown(low, 2, sign=True)} to {shown(high, 2, sign=True)})"
            rows.append(svg.Interval(each.facts.run, value, low, high, text, style))
    if not rows:
        return None
    drawn = svg.forest(
        rows,
        title=f"Top-1: differences from {first.facts.run}",
        description="; ".join(f"{row.name} {row.text}" for row in rows),
        label="higher than the first run, in points →",
    )
    return Picture("Top-1", drawn, "Paired: only images that one run alone recognises count.")


def _curves(runs: Sequence[Finished]) -> Picture | None:
    found = []
    for style, each in enumerate(runs):
        points = [
            (float(line["step"]), 100 * float(line["top1"]))
            for line in validations(each.facts.lines)
        ]
        if len(points) > 1:
            found.append(svg.Curve(each.facts.run, [points], style))
    if not found:
        return None
    drawn = svg.curves(
        found,
        title="Validation accuracy",
        description=f"Curves of {counted(len(found), 'run')} over the steps",
        x_label="steps",
        y_label="accuracy in %",
    )
    return Picture("Validation accuracy", drawn, "Each run on its own validation images.")


def _options(runs: Sequence[Finished]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ, and what each has."""
    names = sorted({name for each in runs for name in each.facts.options} - {"out"})
    rows = [
        (name, [plain(each.facts.options.get(name, MISSING)) for each in runs]) for name in names
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
