"""What a report says in sentences: its headline, its comparisons, and where to look first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nearkin.errors import counted
from nearkin.evaluation.results import NORMAL_95
from nearkin.report.axes import shown
from nearkin.report.browser import percent

if TYPE_CHECKING:
    from nearkin.evaluation.report_data import ReportData
    from nearkin.evaluation.results import ClassMetrics, Metrics

SURE = 0.99  # probability from which an error is worth a sentence
SURPRISE = 0.05  # chance that the weakest class is named although all are equal


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


Image = tuple[str, str]  # path and label


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

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """By the interval and the p value, which differ for few images."""
        if self.low <= 0 <= self.high or self.p > 0.05:
            return "undecided"
        return "better" if self.value > 0 else "worse"


def difference(mine: Mapping[Image, bool], other: Mapping[Image, bool]) -> Difference | None:
    """The difference on the images that both runs have; None without any.

    d = (b - c) / n with b and c images that one run alone recognises. The interval is Agresti and Min's (2005): Wald's,
    half an image added to each of the four cells. p: two-sided, of b among b + c at 1/2.
    """
    from scipy.special import bdtr

    both = [name for name in mine if name in other]
    if not both:
        return None
    better = sum(mine[name] and not other[name] for name in both)
    worse = sum(other[name] and not mine[name] for name in both)
    n, b, c = len(both) + 2, better + 0.5, worse + 0.5
    middle = (b - c) / n
    half = NORMAL_95 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    p = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    value = (better - worse) / len(both)
    return Difference(value, middle - half, middle + half, better, worse, len(both), p)


def headline(data: ReportData) -> str:
    top1, split = data.metrics.top1, data.split
    which = {"val": "validation", "test": "test"}.get(split, split)
    return f"{percent(top1, 1)} of the {which} images are recognised"


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


def validations(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of validations with an accuracy."""
    return [line for line in lines if line.get("kind") == "validation" and "top1" in line]


def candidates(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """The accuracies among which the best weights were chosen: of the last stage, and of the probe."""
    found = validations(lines)
    stages = {"probe", found[-1].get("stage")} if found else set()
    return [float(line["top1"]) for line in found if line.get("stage") in stages]


def refitted(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The accuracy of the classifier that was fitted anew at the end; None where the trained one was kept."""
    found = [line for line in lines if line.get("kind") == "refit"]
    return (
        float(found[-1]["value"]) if found and found[-1]["kept"] and "value" in found[-1] else None
    )


def probe_tile(lines: Sequence[Mapping[str, Any]]) -> Tile | None:
    """The validation accuracy of the probe, and of the model that was kept."""
    found = validations(lines)
    if not found or found[0].get("stage") != "probe":
        return None
    before, *after = candidates(lines)
    if not after:
        return Tile(
            "Probe of the frozen features",
            f"{shown(100 * before, 1)} %",
            "on validation; nothing was trained after it.",
        )
    fitted = refitted(lines)
    best = max(after) if fitted is None else fitted
    start = f"{shown(100 * before, 1)} % (logistic regression on frozen features)"
    if best <= before:
        which = "no epoch was" if fitted is None else "the new classifier is not"
        text = f"on validation: {which} better than {start}, the best had {shown(100 * best, 1)} %."
        return Tile("Fine-tuning, against the probe", "nothing gained", text)
    gain = shown(100 * (best - before), 1, sign=True)
    text = f"on validation: from {start} to {shown(100 * best, 1)} %."
    return Tile("Fine-tuning, against the probe", f"{gain} points", text)


def before_tile(mine: Mapping[Image, bool], run: str, other: Mapping[Image, bool]) -> Tile | None:
    """The difference from an earlier run."""
    found = difference(mine, other)
    if found is None:
        return None
    low, high = (shown(100 * end, 1, sign=True) for end in (found.low, found.high))
    verdict = "no difference is shown" if found.verdict == "undecided" else found.verdict
    return Tile(
        "Against the last run on the same data",
        f"{shown(100 * found.value, 1, sign=True)} points",
        f"95 % interval {low} to {high}: {verdict}. {counted(found.better, 'image')} only this run recognises, "
        f"{found.worse} only {run}. Another seed of the same training gives another number.",
    )


def look_first(data: ReportData) -> list[First]:
    """At most five sentences, what matters most first."""
    found = [*_errors(data), *_mislabelled(data), *_worst_class(data), *_sure(data)]
    if data.metrics.top1 == 1:
        text = "There are no errors. The most uncertain images say where the next ones would be."
        found.append(First(text, "See them", "uncertain"))
    return found or [First("Nothing stands out.", "See the most uncertain images", "uncertain")]


def _errors(data: ReportData) -> Iterator[First]:
    """Which classes are confused most."""
    errors = data.metrics.n - round(data.metrics.n * data.metrics.top1)
    if not data.pairs:
        return
    pair = data.pairs[0]
    taken = f"{pair.true} taken for {pair.predicted}"
    if errors == 1:
        text = f"The only error is {taken}."
    elif pair.images == 1:
        text = f"The {errors} errors are of {errors} kinds, such as {taken}."
    else:
        part = f"{pair.images} of {errors} errors"
        whole = "All errors" if pair.images == errors else "Most errors"
        text = f"{whole if pair.images > errors / 2 else part} are {taken}."
    yield First(text, "See the confused classes", "confusion")


def _mislabelled(data: ReportData) -> Iterator[First]:
    number = data.mislabelled
    if number:
        looked = f"{data.trained}" if data.trained == data.training else f"{data.trained} looked at"
        text = (
            f"{counted(number, 'training image')} of {looked} may have a wrong label: "
            "nearly all of the nearest have one other."
        )
        listed = len(data.suspicious)
        several = f"See the {listed} most suspicious" if listed < number else "See them"
        yield First(text, several, "suspicious")


def weakest(metrics: Metrics) -> ClassMetrics | None:
    """The class that would least likely have so few right answers if the errors were spread over the images by chance
    (Fisher's exact test); None where that is no surprise among so many classes (Bonferroni, 5 %)."""
    from scipy.stats import hypergeom

    n, classes = metrics.n, metrics.per_class
    correct = round(n * metrics.top1)

    def chance(each: ClassMetrics) -> float:
        right = round(each.recall * each.support)
        return float(hypergeom.cdf(right, n, correct, each.support))

    worst = min(classes, key=chance, default=None)
    return None if worst is None or len(classes) * chance(worst) > SURPRISE else worst


def _worst_class(data: ReportData) -> Iterator[First]:
    worst = weakest(data.metrics)
    if worst is not None:
        right = f"{round(worst.recall * worst.support)} of {counted(worst.support, 'image')}"
        text = f"{worst.name} is recognised less often than the rest, beyond chance: {right}."
        yield First(text, "See the worst classes", "classes")


def _sure(data: ReportData) -> Iterator[First]:
    images = data.images
    rows = slice(images.evaluated)
    wrong = images.predicted[rows] != images.labels[rows]
    number = int((wrong & (images.probability[rows] >= SURE)).sum())
    if number:
        verb = "was" if number == 1 else "were"
        sampled = images.evaluated < data.metrics.n
        where = f" of the {images.evaluated} images in this page" if sampled else ""
        text = (
            f"{counted(number, 'error')}{where} {verb} made with a probability of {percent(SURE)} or more: the label "
            "or the model is badly wrong."
        )
        some = number > len(data.worst)
        yield First(text, f"See {len(data.worst)} of them" if some else "See them", "worst")
