"""The parts of the pictures: SVG elements, scales with round ticks, and a shape and colour for each series."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from nearkin.errors import printable

# Pictures are as wide as a phone, so that their text is readable there; a large screen shows several side by side.
WIDTH = 360.0
FONT = 12.0
LINE = 16.0  # from one line of text to the next
LETTER = 0.62  # mean width of a letter, as a share of the font size; system fonts have 0.50 to 0.62


class Svg(str):
    """SVG text in which names are escaped. jinja2 inserts it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


def element(name: str, *inner: str, **attributes: str | float) -> Svg:
    """One element. inner: text, which is escaped, or Svg. attributes: `class_` is `class`, `_` is `-`."""
    words = "".join(
        f' {key if key == "viewBox" else key.strip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
    )
    text = "".join(part if isinstance(part, Svg) else escape(printable(part)) for part in inner)
    return Svg(f"<{name}{words}>{text}</{name}>" if text else f"<{name}{words}/>")


def group(parts: Iterable[Svg]) -> Svg:
    """Elements after one another."""
    return Svg("".join(parts))


def picture(height: float, title: str, description: str, *parts: Svg) -> Svg:
    """A whole picture; screen readers read the title and the description."""
    head = element("title", title), element("desc", description)
    size = f"0 0 {WIDTH:g} {math.ceil(height)}"
    names = {"class_": "chart", "role": "img", "xmlns": "http://www.w3.org/2000/svg"}
    return element("svg", *head, *parts, viewBox=size, **names)


def words(text: str, x: float, y: float, *, room: float = WIDTH, **attributes: str) -> Svg:
    """A line of text with its base line at `y`. What does not fit into `room` is cut, and shown as a tooltip."""
    text = printable(text)
    short = shortened(text, room)
    title = Svg("") if short == text else element("title", text)
    return element("text", short, title, x=x, y=y, **attributes)


def text_width(text: str) -> float:
    """About the width of a line of text; wide East Asian characters count twice."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return (len(text) + wide) * LETTER * FONT


def shortened(text: str, room: float) -> str:
    """`text`; where it is wider than `room`, without its middle: names often differ at their end."""
    if text_width(text) <= room:
        return text
    start, end = text[: len(text) // 2], text[len(text) // 2 :]
    while (start or end) and text_width(f"{start}…{end}") > room:
        if len(start) > len(end):
            start = start[:-1]
        else:
            end = end[1:]
    return f"{start}…{end}"


def shown(value: float, decimals: int, *, sign: bool = False) -> str:
    """A number for people, with a minus sign that is as wide as the plus sign."""
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")  # noqa: RUF001


class Scale(NamedTuple):
    """Values from `low` to `high` are drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, space: float) -> list[tuple[float, str]]:
        """Round values in the range, at least about `space` apart, and how they are written."""
        most = max(2, min(7, int(abs(self.end - self.start) / space)))
        steps = ticks(self.low, self.high, most)
        gap = min((b - a for a, b in pairwise(steps)), default=1.0)
        decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
        return [(value, shown(value, decimals)) for value in steps]


def scale(values: Iterable[float], start: float, end: float, *, margin: float = 0.06) -> Scale:
    """A scale on which all `values` are, with a margin; it is never empty."""
    known = list(values) or [0.0]
    low, high = min(known), max(known)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-6):
        half = 0.05 * max(abs(low), abs(high)) or 1.0
        low, high = low - half, high + half
    space = margin * (high - low)
    return Scale(low - space, high + space, start, end)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most `most` + 1."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def x_axis(along: Scale, top: float, bottom: float, label: str) -> Svg:
    """Lines across the plot at round values, their numbers below it, and the name of the axis."""
    parts = []
    for value, text in along.ticks(45):
        x = along.at(value)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        parts.append(words(text, x, bottom + 14, text_anchor="middle", class_="tick"))
    half = min(text_width(label), WIDTH) / 2
    middle = min(max((along.start + along.end) / 2, half), WIDTH - half)
    return group([*parts, words(label, middle, bottom + 31, text_anchor="middle")])


def y_axis(along: Scale, left: float, right: float, label: str) -> Svg:
    """As `x_axis`; the name of the axis is above the plot, where it need not be turned."""
    parts = []
    for value, text in along.ticks(28):
        y = along.at(value)
        parts.append(element("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        parts.append(words(text, left - 5, y + 4, text_anchor="end", class_="tick"))
    return group([*parts, words(label, 0, along.end - 10)])


def _regular(corners: int, turn: float, inner: float = 1.0) -> tuple[tuple[float, float], ...]:
    """Corners of a polygon; with `inner` below 1, of a star whose every second corner is that far from its centre."""
    number = corners * (1 if inner == 1.0 else 2)
    angles = [turn + 2 * math.pi * k / number for k in range(number)]
    radii = [1.0 if k % 2 == 0 else inner for k in range(number)]
    return tuple((r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True))


# A circle has no corners; the last is an hourglass. Filled and hollow, they tell 20 series apart without colours.
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    _regular(4, math.pi / 4),
    _regular(3, 0),
    _regular(4, 0),
    _regular(3, math.pi),
    _regular(5, 0, 0.45),
    _regular(3, math.pi / 2),
    _regular(4, math.pi / 4, 0.4),
    _regular(3, -math.pi / 2),
    ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9)),
)
DASHES = ("", "6 3", "2 2", "8 2 2 2", "12 3")


def series(style: int) -> str:
    """The class of the colour of a series."""
    return f"s{style % len(SHAPES)}"


def dash(style: int) -> dict[str, str]:
    """The attribute with the dashes of a series' line."""
    pattern = DASHES[style % len(DASHES)]
    return {"stroke_dasharray": pattern} if pattern else {}


def mark(style: int, x: float, y: float, *, size: float = 5.0, title: str = "") -> Svg:
    """The shape of a series, with a tooltip."""
    corners = SHAPES[style % len(SHAPES)]
    hollow = " hollow" if style // len(SHAPES) % 2 else ""
    inner = [element("title", title)] if title else []
    name = f"mark {series(style)}{hollow}"
    if not corners:
        return element("circle", *inner, class_=name, cx=x, cy=y, r=size * 0.85)
    points = " ".join(f"{_value(x + size * a)},{_value(y + size * b)}" for a, b in corners)
    return element("polygon", *inner, class_=name, points=points)


def sample(style: int) -> Svg:
    """The shape of a series beside its name in a text, which says all that a screen reader needs."""
    return element(
        "svg", mark(style, 7, 7, size=5.5), viewBox="0 0 14 14", class_="sample", aria_hidden="true"
    )


def legend(names: Sequence[tuple[int, str]], top: float, *, lines: bool = False) -> Svg:
    """Style and name of each series, in two columns. lines: with its line. Its height is `legend_height`."""
    parts, column = [], WIDTH / 2
    for place, (style, name) in enumerate(names):
        x, y = place % 2 * column, top + place // 2 * LINE + LINE / 2
        end = x + (30 if lines else 12)
        if lines:
            kind = f"mean {series(style)}"
            parts.append(element("line", class_=kind, x1=x, x2=end, y1=y, y2=y, **dash(style)))
        parts.append(mark(style, (x + end) / 2, y))
        parts.append(words(name, end + 6, y + 4, room=column - (end - x) - 10))
    return element("g", *parts, class_="legend")


def legend_height(number: int) -> float:
    return math.ceil(number / 2) * LINE + 6


def _value(value: str | float) -> str:
    """An attribute's value; a tenth of a unit is less than can be seen."""
    if isinstance(value, str):
        return escape(printable(value))
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
