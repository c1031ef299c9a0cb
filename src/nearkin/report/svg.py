"""Pictures as SVG text: intervals, a scatter, curves, and bars on both sides of 0. Pure functions of plain values.

Values that are None, NaN or infinite are not drawn. Colours are CSS variables of the page; the shape of a series, its
dashes or its side of the zero line say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeGuard

import numpy as np

from nearkin.report.axes import (
    WIDTH,
    Scale,
    Svg,
    dash,
    element,
    group,
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

LEFT, RIGHT = 44.0, WIDTH - 10  # of a plot with numbers at its left side
TOP, PLOT = 26.0, 220.0
BELOW = 42.0  # room for the numbers and the name of an axis
LABELLED = 8  # series with a name beside their mark; more are named in a legend
MOST_POINTS = 40  # of a line; more are not seen on so few pixels, and make the page large

Point = tuple[float, float]


class Interval(NamedTuple):
    """A row of a forest plot. text: its numbers in words. style: of its mark."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    style: int


class Dot(NamedTuple):
    """A point of a scatter. large: it stands for its series, which gets its name there."""

    name: str
    x: float | None
    y: float | None
    text: str
    style: int
    large: bool = False


class Curve(NamedTuple):
    """A series of lines."""

    name: str
    lines: Sequence[Sequence[Point]]
    style: int


def forest(
    rows: Sequence[Interval],
    *,
    title: str,
    description: str,
    label: str,
    band: float | None = None,
) -> Svg:
    """A mark and its interval for each row, under its name and numbers; a line at 0.

    band: differences up to this, in both directions, do not matter.
    """
    known = [v for row in rows for v in (row.value, row.low, row.high) if finite(v)]
    along = scale([0.0, *known, *((-band, band) if band else ())], 10, RIGHT)
    height, top = 36.0, 6.0
    bottom = top + height * len(rows)
    parts = []
    if band:
        start, end = along.at(-band), along.at(band)
        parts.append(
            element("rect", class_="band", x=start, y=top, width=end - start, height=bottom - top)
        )
    parts.append(x_axis(along, top, bottom, label))
    parts.append(_zero(along, top, bottom))
    for place, row in enumerate(rows):
        parts.append(_interval(row, along, top + height * place))
    return picture(bottom + BELOW, title, description, *parts)


def _interval(row: Interval, along: Scale, top: float) -> Svg:
    room = WIDTH - text_width(row.text) - 14
    parts = [
        words(row.name, 0, top + 13, room=room, class_="name"),
        words(row.text, WIDTH, top + 13, text_anchor="end"),
    ]
    y = top + 25
    if finite(row.low) and finite(row.high):
        x1, x2 = along.at(row.low), along.at(row.high)
        parts.append(
            element("line", class_=f"interval {series(row.style)}", x1=x1, x2=x2, y1=y, y2=y)
        )
    if finite(row.value):
        parts.append(mark(row.style, along.at(row.value), y, title=f"{row.name}: {row.text}"))
    return group(parts)


def scatter(
    dots: Sequence[Dot], *, title: str, description: str, x_label: str, y_label: str
) -> Svg:
    """Points; the large ones are drawn last and named, beside them or, where there are many, in a legend."""
    known = [dot for dot in dots if finite(dot.x) and finite(dot.y)]
    bottom = TOP + PLOT
    across = scale([dot.x for dot in known if finite(dot.x)], LEFT, RIGHT)
    up = scale([dot.y for dot in known if finite(dot.y)], bottom, TOP)
    parts = [x_axis(across, TOP, bottom, x_label), y_axis(up, LEFT, RIGHT, y_label)]
    places = [(dot, across.at(dot.x or 0.0), up.at(dot.y or 0.0)) for dot in known]
    large = [place for place in places if place[0].large]
    for dot, x, y in sorted(places, key=lambda place: place[0].large):
        size = 7.5 if dot.large else 3.0
        drawn = mark(dot.style, x, y, size=size, title=f"{dot.name}: {dot.text}")
        parts.append(drawn if dot.large else element("g", drawn, class_="small"))
    height = bottom + BELOW
    if len(large) <= LABELLED:
        parts.append(_labels(large, [(x, y) for dot, x, y in places if not dot.large]))
    else:
        parts.append(legend([(dot.style, dot.name) for dot, _, _ in large], height))
        height += legend_height(len(large))
    return picture(height, title, description, *parts)


def _labels(points: Sequence[tuple[Dot, float, float]], others: Sequence[Point]) -> Svg:
    """A name beside each point: at the first place where it covers no other name and no point."""
    taken = [_around(x, y, 9) for _, x, y in points] + [_around(x, y, 3) for x, y in others]
    parts = []
    for dot, x, y in points:
        room = min(text_width(dot.name) * 1.1, 0.4 * WIDTH)  # bold letters are wider
        places = [
            (left, top)
            for far in range(0, 140, 14)
            for down in ({0} if far == 0 else {far, -far})
            for left, top in ((x + 11, y - 7 + down), (x - 11 - room, y - 7 + down))
            if left >= LEFT and left + room <= WIDTH and TOP <= top <= TOP + PLOT - 14
        ]
        boxes = [(left, top, left + room, top + 14) for left, top in places]
        free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
        box = (free or boxes or [(x, y, x + room, y + 14)])[0]
        taken.append(box)
        right = box[0] > x
        near = box[0] if right else box[2]
        if abs(box[1] + 7 - y) > 14:
            parts.append(element("line", class_="leader", x1=x, y1=y, x2=near, y2=box[1] + 7))
        anchor = "start" if right else "end"
        parts.append(
            words(dot.name, near, box[1] + 11, room=room, text_anchor=anchor, class_="name")
        )
    return group(parts)


def _around(x: float, y: float, far: float) -> tuple[float, float, float, float]:
    return x - far, y - far, x + far, y + far


def _overlap(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> bool:
    across = first[0] < second[2] and second[0] < first[2]
    return across and first[1] < second[3] and second[1] < first[3]


def curves(
    found: Sequence[Curve], *, title: str, description: str, x_label: str, y_label: str
) -> Svg:
    """Every line thin, and the mean of each series thick, with its shape at some points."""
    kept = [
        curve._replace(lines=[line for line in map(_known, curve.lines) if line]) for curve in found
    ]
    points = [point for curve in kept for line in curve.lines for point in line]
    bottom = TOP + PLOT
    across = scale([x for x, _ in points], LEFT, RIGHT)
    up = scale([y for _, y in points], bottom, TOP)
    parts = [x_axis(across, TOP, bottom, x_label), y_axis(up, LEFT, RIGHT, y_label)]
    for curve in kept:
        name = f"thin {series(curve.style)}"
        parts += [_line(line, across, up, name) for line in curve.lines]
    for place, curve in enumerate(kept):
        line = mean_line(curve.lines)
        parts.append(_line(line, across, up, f"mean {series(curve.style)}", **dash(curve.style)))
        # Not all at the same places, so that shapes of curves that are close do not cover one another.
        for x, y in _spread(line, place):
            parts.append(mark(curve.style, across.at(x), up.at(y), size=4.5, title=curve.name))
    height = bottom + BELOW
    names = [(curve.style, curve.name) for curve in kept]
    parts.append(legend(names, height, lines=True))
    return picture(height + legend_height(len(names)), title, description, *parts)


def mean_line(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of several lines, where all of them are, straight between their points."""
    if not lines:
        return []
    start, end = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    places = sorted({x for line in lines for x, _ in line if start <= x <= end})
    heights = [np.interp(places, [x for x, _ in line], [y for _, y in line]) for line in lines]
    return [(x, float(y)) for x, y in zip(places, np.mean(heights, axis=0), strict=True)]


def _line(line: Sequence[Point], across: Scale, up: Scale, name: str, **attributes: str) -> Svg:
    number = len(line)
    if number > MOST_POINTS:
        line = [line[round(k * (number - 1) / (MOST_POINTS - 1))] for k in range(MOST_POINTS)]
    points = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line)
    return element("polyline", class_=name, points=points, **attributes)


def _spread(line: Sequence[Point], place: int) -> list[Point]:
    """The last point, and up to three before it."""
    number = len(line)
    inner = {round((k + place % 4 / 4) * number / 4) for k in range(1, 4)}
    return [line[k] for k in sorted(inner | {number - 1}) if 0 <= k < number]


def _known(line: Iterable[Point]) -> list[Point]:
    """In the order of x, one value for each."""
    return sorted({x: y for x, y in line if finite(x) and finite(y)}.items())


def bars(
    values: Sequence[tuple[str, float | None]],
    *,
    title: str,
    description: str,
    label: str,
    most: int = 15,
) -> Svg:
    """Bars to the right of 0 for values above it and to the left for those below, the largest first.

    most: where there are more than twice as many, only the `most` largest and the `most` smallest are drawn.
    """
    rows = largest([(name, value) for name, value in values if finite(value)], most)
    left, height, top = 0.34 * WIDTH, 17.0, 6.0
    bottom = top + height * len(rows)
    room = max((text_width(shown(value, 1, sign=True)) for _, value in rows), default=0) + 4
    inner = scale([0.0, *(value for _, value in rows)], left + room, WIDTH - room, margin=0)
    parts = [x_axis(inner, top, bottom, label), _zero(inner, top, bottom)]
    for place, (name, value) in enumerate(rows):
        parts.append(_bar(name, value, inner, top + height * place, left))
    return picture(bottom + BELOW, title, description, *parts)


def largest(rows: Sequence[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """The rows from the largest value to the smallest; of more than 2 `most`, the `most` largest above 0 and the `most`
    smallest below it."""
    ordered = sorted(rows, key=lambda row: (-row[1], row[0]))
    if len(ordered) <= 2 * most:
        return ordered
    above = [row for row in ordered if row[1] > 0][:most]
    below = [row for row in ordered if row[1] < 0][-most:]
    return above + below


def _bar(name: str, value: float, along: Scale, top: float, left: float) -> Svg:
    text = shown(value, 1, sign=True)
    start, end = sorted((along.at(0), along.at(value)))
    side = "down" if value < 0 else "up"
    place = (start - 3, "end") if value < 0 else (end + 3, "start")
    return group(
        [
            words(name, 0, top + 12, room=left - 4),
            element(
                "rect", class_=f"bar {side}", x=start, y=top + 2, width=end - start, height=13.0
            ),
            words(text, place[0], top + 12, text_anchor=place[1]),
        ]
    )


def _zero(along: Scale, top: float, bottom: float) -> Svg:
    x = along.at(0)
    return element("line", class_="zero", x1=x, x2=x, y1=top, y2=bottom)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return value is not None and math.isfinite(value)
