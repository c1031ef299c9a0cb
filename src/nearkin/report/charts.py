"""Pictures of one run: bars of its classes, a reliability diagram, accuracy against coverage. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.evaluation.results import wilson
from nearkin.report.axes import (
    WIDTH,
    Scale,
    Svg,
    element,
    legend,
    legend_height,
    mark,
    picture,
    scale,
    series,
    shown,
    text_width,
    words,
    x_axis,
    y_axis,
)
from nearkin.report.svg import BELOW, LEFT, PLOT, RIGHT, TOP

BINS = 10  # of a reliability diagram
MOST_POINTS = 60  # of a line
ROW = 30.0


class Share(NamedTuple):
    """A row of bars: a share in [0, 1], the ends of its interval, and its numbers in words."""

    name: str
    value: float
    low: float
    high: float
    text: str


class Bin(NamedTuple):
    """Predictions of about the same confidence: mean confidence and accuracy in [0, 1], and how many there are."""

    confidence: float
    accuracy: float
    images: int


class Reliability(NamedTuple):
    """A series of a reliability diagram."""

    name: str
    bins: Sequence[Bin]
    style: int


def shares(rows: Sequence[Share], *, title: str, description: str, label: str) -> Svg:
    """A bar from 0 to 100 % for each row with its interval, under its name and numbers, in the order given."""
    along, top = Scale(0.0, 100.0, 4.0, WIDTH - 12), 6.0
    bottom = top + ROW * len(rows)
    parts = [x_axis(along, top, bottom, label)]
    for place, row in enumerate(rows):
        y = top + ROW * place
        low, high = along.at(100 * row.low), along.at(100 * row.high)
        middle = y + 22.5
        parts += [
            words(row.name, 0, y + 13, room=WIDTH - text_width(row.text) - 14, class_="name"),
            words(row.text, WIDTH, y + 13, text_anchor="end"),
            element(
                "rect",
                class_="bar plain",
                x=along.start,
                y=y + 18,
                width=along.at(100 * row.value) - along.start,
                height=9.0,
            ),
            element("line", class_="whisker", x1=low, x2=high, y1=middle, y2=middle),
        ]
    return picture(bottom + BELOW, title, description, *parts)


def bins(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> list[Bin]:
    """The predictions in BINS bins of equal width, ((b / BINS, (b + 1) / BINS]; empty ones are left out."""
    edges = np.arange(1, BINS) / BINS
    place = np.searchsorted(edges, confidence, side="left")
    found = []
    for number in range(BINS):
        inside = place == number
        if inside.any():
            means = float(confidence[inside].mean()), float(correct[inside].mean())
            found.append(Bin(*means, int(inside.sum())))
    return found


def reliability(found: Sequence[Reliability], *, title: str, description: str) -> Svg:
    """Accuracy against confidence; on the dashed line both are the same. The larger a mark, the more images."""
    bottom = TOP + PLOT
    across, up = Scale(0, 100, LEFT, RIGHT), Scale(0, 100, bottom, TOP)
    parts = [
        x_axis(across, TOP, bottom, "confidence in %"),
        y_axis(up, LEFT, RIGHT, "accuracy in %"),
        element("line", class_="band-line", x1=LEFT, y1=bottom, x2=RIGHT, y2=TOP),
    ]
    total = max((each.images for one in found for each in one.bins), default=1)
    for one in found:
        points = [(across.at(100 * b.confidence), up.at(100 * b.accuracy)) for b in one.bins]
        for (x, y), each in zip(points, one.bins, strict=True):
            text = (
                f"{one.name}: {each.images} images, confidence {shown(100 * each.confidence, 1)} %, "
                f"accuracy {shown(100 * each.accuracy, 1)} %"
            )
            low, high = (up.at(100 * end) for end in wilson(each.accuracy, each.images))
            whisker = f"whisker {series(one.style)}"
            parts.append(element("line", class_=whisker, x1=x, x2=x, y1=low, y2=high))
            size = 3.5 + 4.5 * (each.images / total) ** 0.5
            parts.append(mark(one.style, x, y, size=size, title=text))
    height = bottom + BELOW
    names = [(one.style, one.name) for one in found]
    parts.append(legend(names, height))
    return picture(height + legend_height(len(names)), title, description, *parts)


def covered(
    confidence: NDArray[np.float32], correct: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """Share of images kept and their accuracy, in %, when only the most confident are kept."""
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(correct[order]) / kept
    first = min(len(order), max(10, len(order) // 20)) - 1  # fewer are chance
    some = np.unique(np.linspace(first, len(order) - 1, MOST_POINTS).round().astype(int))
    return [(100 * kept[k] / len(order), 100 * float(accuracy[k])) for k in some.tolist()]


def coverage(points: Sequence[tuple[float, float]], *, title: str, description: str) -> Svg:
    """Accuracy against the share of images that are answered."""
    bottom = TOP + PLOT
    across = Scale(0, 100, LEFT, RIGHT)
    up = scale([*(y for _, y in points), 100.0], bottom, TOP)._replace(high=100.0)
    line = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in points)
    parts = [
        x_axis(across, TOP, bottom, "answered images in %, the most confident first"),
        y_axis(up, LEFT, RIGHT, "accuracy in %"),
        element("polyline", class_="mean s1", points=line),
    ]
    if points:
        x, y = points[-1]
        parts.append(mark(1, across.at(x), up.at(y), title=f"all images: {shown(y, 1)} %"))
    return picture(bottom + BELOW, title, description, *parts)
