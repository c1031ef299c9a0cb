"""What a report says in sentences: its headline, its comparisons, and where to look first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nearkin.errors import counted
from nearkin.report.axes import shown

if TYPE_CHECKING:
    from nearkin.evaluation.report_data import ReportData

SURE = 0.99  # probability from which an error counts as made with certainty
Z = 1.959964


class Tile(NamedTuple):
    """A number with its name, and what it is compared with."""

    term: str
    value: str
    text: str


class First(NamedTuple):
    """A sentence about what to look at, and the part of the page where it is."""

    text: str
    link: str
    where: str


class Difference(NamedTuple):
    """Of two runs on the same images, in shares: mean and 95 % interval. better, worse: images that only this run, and
    only the other one recognises. p: of McNemar's exact test."""

    value: float
    low: float
    high: float
    better: int
    worse: int
    images: int
    p: float


def difference(mine: Mapping[str, bool], other: Mapping[str, bool]) -> Difference | None:
    """The difference on the images that both runs have; None without any.

    d = (b - c) / n with b and c images that one run alone recognises. The interval is Agresti and Min's (2005): Wald's,
    half an image added to each of the four cells. p: two-sided, of b among b + c at 1/2.
    """
    from scipy.stats import binomtest

    both = [name for name in mine if name in other]
    if not both:
        return None
    better = sum(mine[name] and not other[name] for name in both)
    worse = sum(other[name] and not mine[name] for name in both)
    n, b, c = len(both) + 2, better + 0.5, worse + 0.5
    middle = (b - c) / n
    half = Z * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    value = (better - worse) / len(both)
    return Difference(value, middle - half, middle + half, better, worse, len(both), p)


def headline(data: ReportData) -> str:
    top1, split = data.metrics.top1, data.split
    which = {"val": "validation", "test": "test"}.get(split, split)
    return f"{shown(100 * top1, 1)} % of the {which} images are recognised"


def extent(data: ReportData) -> str:
    low, high = (shown(100 * end, 1) for end in data.metrics.interval)
    wrong = round(data.metrics.n * (1 - data.metrics.top1))
    text = (
        f"{counted(data.metrics.n, 'image')} of {counted(len(data.classes), 'class', 'classes')}, "
        f"{counted(wrong, 'error')}. Other images of the same kind would give {low} to {high} % (95 % interval)."
    )
    if data.split == "val":
        text += (
            " There is no test split; these images chose the best epoch, so the number is too good."
        )
    return text


def probe_tile(lines: Sequence[Mapping[str, Any]]) -> Tile | None:
    """The validation accuracy of the probe, and of the model that was kept."""
    found = [line for line in lines if line.get("kind") == "validation"]
    probe = next((line for line in found if line.get("stage") == "probe"), None)
    after = [line["top1"] for line in found if "top1" in line and line.get("stage") != "probe"]
    if probe is None or "top1" not in probe:
        return None
    before = float(probe["top1"])
    if not after:
        return Tile(
            "Probe of the frozen features",
            f"{shown(100 * before, 1)} %",
            "on validation; nothing was trained after it.",
        )
    gain = shown(100 * (max(after) - before), 1, sign=True)
    return Tile(
        "Fine-tuning, against the probe",
        f"{gain} points",
        f"on validation: from {shown(100 * before, 1)} % (logistic regression on frozen features) to {shown(100 * max(after), 1)} %.",
    )


def before_tile(mine: Mapping[str, bool], run: str, other: Mapping[str, bool]) -> Tile | None:
    """The difference from an earlier run."""
    found = difference(mine, other)
    if found is None:
        return None
    low, high = (shown(100 * end, 1, sign=True) for end in (found.low, found.high))
    verdict = (
        "no difference is shown"
        if found.low <= 0 <= found.high
        else ("better" if found.value > 0 else "worse")
    )
    return Tile(
        "Against the last run on the same data",
        f"{shown(100 * found.value, 1, sign=True)} points",
        f"95 % interval {low} to {high}: {verdict}. {found.better} images only this run recognises, {found.worse} only {run}.",
    )


def look_first(data: ReportData) -> list[First]:
    """At most five sentences, what matters most first."""
    errors = data.metrics.n - round(data.metrics.n * data.metrics.top1)
    found = []
    if data.pairs and errors:
        pair = data.pairs[0]
        most = (
            "Most errors are"
            if pair.images > errors / 2
            else f"{pair.images} of {errors} errors are"
        )
        found.append(
            First(
                f"{most} {pair.true} taken for {pair.predicted}.",
                "See the confused classes",
                "confusion",
            )
        )
    if data.mislabelled:
        verb = "looks" if data.mislabelled == 1 else "look"
        found.append(
            First(
                f"{counted(data.mislabelled, 'training image')} of {data.trained} {verb} mislabelled: nearly all of the nearest kin have another label.",
                "See them",
                "suspicious",
            )
        )
    worst = min(data.metrics.per_class, key=lambda c: c.recall if c.support else 2.0)
    if worst.support and worst.recall < data.metrics.top1 - 0.05:
        found.append(
            First(
                f"{worst.name} is recognised least often: {round(worst.recall * worst.support)} of {counted(worst.support, 'image')}.",
                "See all classes",
                "classes",
            )
        )
    images = data.images
    wrong = images.predicted[: images.evaluated] != images.labels[: images.evaluated]
    sure = int((wrong & (images.probability[: images.evaluated] >= SURE)).sum())
    if sure:
        verb = "was" if sure == 1 else "were"
        found.append(
            First(
                f"{counted(sure, 'error')} {verb} made with a probability of {SURE:.0%} or more; often the label is wrong, not the model.".replace(
                    "99%", "99 %"
                ),
                "See them",
                "worst",
            )
        )
    if not errors:
        found.append(
            First(
                "There are no errors. The most uncertain images say where the next ones would be.",
                "See them",
                "uncertain",
            )
        )
    return found or [
        First(
            "Nothing stands out. The errors are spread over the classes.",
            "See the errors",
            "images",
        )
    ]
