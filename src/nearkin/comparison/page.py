"""The HTML page of a comparison: its headline in words, tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from nearkin.comparison.results import MEASURES, SAME, Comparison, Contrast, Measure, Run
from nearkin.comparison.statistics import LEAST_SEEDS
from nearkin.errors import counted
from nearkin.report import svg
from nearkin.report.axes import sample, shown
from nearkin.report.page import MISSING, Picture, render

MOST_SENTENCES = 3  # with numbers, of entries that are better, and of those that are worse
MOST_BARS = 15  # in each direction
LEAST_LATE = 3  # validations in the second half that make a picture of it worth while
LONGEST_ERROR = 1000  # characters; the end of a message says the most
ORDER = ("better", "worse", "the same", "undecided", "no verdict")
UNITS = (("hours", 3600), ("minutes", 60))
NAMES: dict[Measure, str] = {
    "top1": "Top-1",
    "balanced": "Balanced accuracy",
    "log_loss": "Log loss",
}


def comparison_page(comparison: Comparison) -> str:
    """One HTML file without scripts and without anything from elsewhere."""
    first, *others = _headline(comparison)
    return render(
        "compare.html",
        data=comparison.data,
        baseline=comparison.baseline,
        folder=comparison.folder,
        headline=[first, *others],
        warnings=_warnings(comparison.runs),
        extent=_extent(comparison),
        notes=[*comparison.notes, *_picked(comparison)],
        rows=[_row(comparison, row) for row in comparison.table()],
        intervals=[_forest(comparison, measure) for measure in MEASURES if comparison.contrasts],
        time=_time(comparison),
        curves=_curves(comparison),
        classes=_classes(comparison),
        equal=list(comparison.equal.items()),
        runs=[_run(run) for run in comparison.runs],
        failed=[_failure(run) for run in comparison.runs if run.state == "failed"],
        reading=_reading(comparison),
    )


def _headline(comparison: Comparison) -> list[str]:
    """What is known of top-1, in sentences; the most important first."""
    baseline = comparison.baseline
    if not comparison.finished(baseline):
        return [f"Nothing can be said yet: no run of {baseline} is finished."]
    judged = (c for c in comparison.contrasts if c.measure == "top1")
    found = [each for each in judged if not each.verdict.startswith("no verdict")]
    if not found and any(run.epochs == 0 for run in comparison.runs):
        return ["There is no verdict: runs without an epoch are probes of the same features."]
    if not found:
        return [
            f"There is no verdict yet: {baseline} and another entry need {LEAST_SEEDS} finished seeds in common."
        ]
    found.sort(key=lambda each: -each.difference)
    better = _sentences([each for each in found if each.verdict == "better"], baseline)
    worse = _sentences([each for each in found[::-1] if each.verdict == "worse"], baseline)
    same = [
        f"{each.entry} is {each.verdict.replace('the same', f'the same as {baseline}', 1)}."
        for each in found
        if each.verdict.startswith("the same")
    ]
    open_ = [each.entry for each in found if each.verdict.startswith("undecided")]
    undecided = [f"It is undecided for {_listed(open_)}."] if open_ else []
    none = [] if better else [f"No objective is shown to be better than {baseline}."]
    silent = {*comparison.entries} - {baseline} - {each.entry for each in found}
    early = [name for name in comparison.entries if name in silent]
    too_early = [f"There is no verdict yet for {_listed(early)}."] if early else []
    return [*none, *better, *worse, *same, *undecided, *too_early]


def _sentences(found: Sequence[Contrast], baseline: str) -> list[str]:
    """The largest differences in full, and the names of the others."""
    full, rest = found[:MOST_SENTENCES], [each.entry for each in found[MOST_SENTENCES:]]
    verb = "is" if len(rest) == 1 else "are"
    others = [f"{_listed(rest)} {verb} {found[0].verdict} than {baseline}, too."] if rest else []
    return [_compared(each, baseline) for each in full] + others


def _compared(each: Contrast, baseline: str) -> str:
    sign = 100 if each.verdict == "better" else -100
    low, high = sorted(sign * end for end in each.interval)
    decimals = 1 if low >= 0.1 else 2
    by, low_, high_ = (shown(value, decimals) for value in (sign * each.difference, low, high))
    return f"{each.entry} is {each.verdict} than {baseline} by {by} points (95 % interval {low_} to {high_})."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _warnings(runs: Iterable[Run]) -> list[str]:
    states = [run.state for run in runs]
    failed, waiting = states.count("failed"), states.count("waiting")
    found = []
    if failed:
        found.append(f"{counted(failed, 'run')} failed; the errors are below the table of runs.")
    if waiting:
        verb = "is" if waiting == 1 else "are"
        found.append(
            f"{counted(waiting, 'run')} {verb} waiting, so these results can still change."
        )
    return found


def _extent(comparison: Comparison) -> str:
    done = sum(run.state == "finished" for run in comparison.runs)
    number = counted(len(comparison.entries), "entry", "entries")
    images = f", tested on {counted(comparison.images, 'image')}" if comparison.images else ""
    return (
        f"{number} with {counted(comparison.seeds, 'seed')}{images}; {done} of "
        f"{counted(len(comparison.runs), 'run')} finished."
    )


def _picked(comparison: Comparison) -> list[str]:
    picked = comparison.to_dict()["picked"]
    return [f"Picked: {picked['entry']}, trained in {picked['run']}."] if picked else []


def _styles(comparison: Comparison) -> dict[str, int]:
    """The mark of each entry, that of the baseline first."""
    names = dict.fromkeys([comparison.baseline, *comparison.entries])
    return {name: place for place, name in enumerate(names)}


def _number(value: float | None, factor: float = 1.0, decimals: int = 2) -> str:
    return shown(factor * value, decimals) if svg.finite(value) else MISSING


def _mebibytes(value: int | None) -> str:
    return _number(value, 2**-20, 0) if value else MISSING


def _row(comparison: Comparison, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table in words."""
    entry = row["entry"]
    found = comparison.contrast(entry)
    spread = "" if row["top1_std"] is None else f" ± {_number(row['top1_std'], 100)}"
    millions = None if row["weights"] is None else row["weights"] / 1e6
    return {
        "entry": entry,
        "sample": sample(_styles(comparison)[entry]),
        "top1": _number(row["top1"], 100) + spread,
        "difference": MISSING if found is None else shown(100 * found.difference, 2, sign=True),
        "interval": "" if found is None else _ends(found, 100, 2),
        "verdict": row["verdict"] or "baseline",
        "wins": MISSING if found is None else f"{found.wins} of {found.seeds}",
        "balanced": _number(row["balanced"], 100),
        "log_loss": _number(row["log_loss"], decimals=3),
        "crops_per_second": _number(row["crops_per_second"], decimals=0),
        "seconds": _number(row["seconds"], decimals=1),
        "memory": _mebibytes(row["memory"]),
        "weights": MISSING if millions is None else f"{_number(millions)} M",
        "failed": str(row["failed"]),
    }


def _ends(found: Contrast, factor: float, decimals: int) -> str:
    low, high = (shown(factor * end, decimals, sign=True) for end in found.interval)
    return f"{low} to {high}"


def _forest(comparison: Comparison, measure: Measure) -> Picture:
    """The interval of every entry in one measure. Accuracies are in points, the log loss as it is."""
    factor, decimals = (1, 3) if measure == "log_loss" else (100, 2)
    band, within = SAME[measure]
    rows = []
    for entry, style in _styles(comparison).items():
        found = comparison.contrast(entry, measure)
        if entry == comparison.baseline:
            continue
        if found is None:
            rows.append(svg.Interval(entry, None, None, None, "no interval yet", style))
            continue
        value = factor * found.difference
        text = f"{shown(value, decimals, sign=True)} ({_ends(found, factor, decimals)})"
        low, high = (factor * end for end in found.interval)
        rows.append(svg.Interval(entry, value, low, high, text, style))
    lower = measure == "log_loss"
    label = f"{'lower' if lower else 'higher'} than {comparison.baseline}{'' if lower else ', in points'} →"
    drawn = svg.forest(
        rows,
        title=f"{NAMES[measure]}: differences from {comparison.baseline}",
        description=f"A mark and a 95 % interval for each of {counted(len(rows), 'entry', 'entries')}; above 0 is "
        f"{label.removesuffix(' →')}: " + "; ".join(f"{row.name} {row.text}" for row in rows),
        label=label,
        band=factor * band,
    )
    return Picture(
        NAMES[measure], drawn, f"Grey: differences up to {within}. {_verdicts(comparison, measure)}"
    )


def _verdicts(comparison: Comparison, measure: Measure) -> str:
    """`Better: a, b. Undecided: c.`"""
    groups: dict[str, list[str]] = {}
    for each in comparison.contrasts:
        if each.measure == measure:
            groups.setdefault(each.verdict.split(":")[0], []).append(each.entry)
    known = [what for word in ORDER for what in groups if what.startswith(word)]
    ordered = dict.fromkeys([*known, *groups])
    return " ".join(f"{what.capitalize()}: {', '.join(groups[what])}." for what in ordered)


def _time(comparison: Comparison) -> Picture | None:
    """Top-1 of every finished run against its seconds, and their means."""
    runs = [run for run in comparison.runs if run.top1 is not None and run.seconds is not None]
    if not runs:
        return None
    longest = max(run.seconds or 0.0 for run in runs)
    unit, size = next((u for u in UNITS if longest >= 2 * u[1]), ("seconds", 1))
    dots = []
    for entry, style in _styles(comparison).items():
        points = [
            (run.seed, run.seconds or 0.0, 100 * (run.top1 or 0.0))
            for run in runs
            if run.entry == entry
        ]
        dots += [
            svg.Dot(
                entry,
                x / size,
                y,
                f"seed {seed}, {shown(y, 2)} %, {shown(x / size, 1)} {unit}",
                style,
            )
            for seed, x, y in points
        ]
        if points:
            x, y = (statistics.mean(point[k] for point in points) for k in (1, 2))
            text = f"mean, {shown(y, 2)} %, {shown(x / size, 1)} {unit}"
            dots.append(svg.Dot(entry, x / size, y, text, style, large=True))
    means = "; ".join(f"{dot.name} {dot.text}" for dot in dots if dot.large)
    drawn = svg.scatter(
        dots,
        title="Top-1 against training time",
        description=f"A point for each run and a larger one for each mean: {means}",
        x_label=f"{unit} of training",
        y_label="top-1 in %",
    )
    return Picture("Each run, and the mean of each entry", drawn, "Up and to the left is better.")


def _curves(comparison: Comparison) -> list[Picture]:
    """The validation of every finished run, and its second half, where differences are small."""
    found = []
    for entry, style in _styles(comparison).items():
        lines = [[(x / 1000, 100 * y) for x, y in run.curve] for run in comparison.finished(entry)]
        if any(lines):
            found.append(svg.Curve(entry, lines, style))
    places = sorted({x for curve in found for line in curve.lines for x, _ in line})
    if not places:
        return []
    stages = "Where a stage has no classifier, the value is that of the nearest neighbours."
    whole = _curve_picture(
        "The whole training", found, f"Thin: one run. Thick: the mean over seeds. {stages}"
    )
    half = places[-1] / 2
    late = [
        each._replace(lines=[[point for point in line if point[0] >= half] for line in each.lines])
        for each in found
    ]
    if sum(x >= half for x in places) < LEAST_LATE:
        return [whole]
    return [whole, _curve_picture("The second half", late, "The same, from half of the crops on.")]


def _curve_picture(title: str, found: Sequence[svg.Curve], caption: str) -> Picture:
    drawn = svg.curves(
        found,
        title=f"Validation accuracy: {title.lower()}",
        description=f"Every run, and the mean over seeds of {_listed([each.name for each in found])}.",
        x_label="crops through the network, in thousands",
        y_label="validation accuracy in %",
    )
    return Picture(title, drawn, caption)


def _classes(comparison: Comparison) -> list[Picture]:
    """For every other entry, the classes that it recognises better and worse than the baseline."""
    base = comparison.classes.get(comparison.baseline, {})
    found = []
    for entry in comparison.entries:
        mine = comparison.classes.get(entry, {})
        values = [(name, 100 * (mine[name] - base[name])) for name in base if name in mine]
        if entry == comparison.baseline or not values:
            continue
        number = len(svg.largest(values, MOST_BARS))
        every = number == len(values)
        drawn = svg.bars(
            values,
            title=f"{entry}: accuracy of classes, less that of {comparison.baseline}",
            description=f"A bar for each of {counted(number, 'class', 'classes')}, the largest difference first.",
            label=f"points above {comparison.baseline}",
            most=MOST_BARS,
        )
        some = f"The largest differences in both directions, {number} of {len(values)} classes."
        found.append(Picture(entry, drawn, f"All {len(values)} classes." if every else some))
    return found


def _run(run: Run) -> dict[str, str]:
    return {
        "entry": run.entry,
        "seed": str(run.seed),
        "state": run.state,
        "top1": _number(run.top1, 100),
        "balanced": _number(run.balanced, 100),
        "log_loss": _number(run.log_loss, decimals=3),
        "crops_per_second": _number(run.crops_per_second, decimals=0),
        "seconds": _number(run.seconds, decimals=1),
        "memory": _mebibytes(run.memory),
        "folder": run.folder,
    }


def _failure(run: Run) -> dict[str, Any]:
    text = (run.error or "").strip() or "The run left no message."
    if len(text) > LONGEST_ERROR:
        text = f"… {text[-LONGEST_ERROR:]}"
    return {"entry": run.entry, "seed": run.seed, "lines": text.splitlines()}


def _reading(comparison: Comparison) -> list[str]:
    """What the numbers mean, for a reader who knows no statistics."""
    baseline, within = comparison.baseline, SAME["top1"][1]
    return [
        f"All entries were trained with the same seeds and tested on the same images as {baseline}. Seeds and images "
        "are both samples: other ones would give another difference. The 95 % interval counts both (crossed random "
        "effects of seeds and images), so it holds for new runs on new images of the same kind, not for these alone. "
        "A t test over the seeds alone must agree: the wider of the two intervals is shown.",
        "An entry is called better or worse only if its difference is significant at 5 % after Holm's correction for "
        "the number of entries. The intervals are not corrected: with several entries, one that barely leaves out 0 "
        "can come without a verdict.",
        f"“The same within {within}” means that the 90 % interval lies within the grey band. “Undecided” means that "
        "nothing is shown, not that the entries are equal. With fewer than "
        f"{LEAST_SEEDS} seeds there is no verdict, since the spread between seeds is not known well enough.",
        "Balanced accuracy is the mean over classes. The log loss, which is better when lower, is that of the "
        "probabilities as trained, before the temperature that “nearkin predict” applies; its differences are drawn so "
        "that right is better. Each of these measures has its own Holm correction. "
        "Seconds include validation, crops per second do not; both depend on what else the machine did.",
    ]
