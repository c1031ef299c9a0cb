"""The pictures as XML: one mark for each value, at the place of the value, and names that are only text."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearkin.report import svg
from nearkin.report.axes import (
    DASHES,
    SHAPES,
    WIDTH,
    Svg,
    element,
    mark,
    scale,
    shortened,
    shown,
    text_width,
    ticks,
)

NAMESPACE = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title></svg><script>alert(1)</script>\"'&\u202e\x00\ud800"
WORDS = {"title": "a title", "description": "what it shows"}
AXES = WORDS | {"x_label": "seconds", "y_label": "top-1"}


def parsed(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{NAMESPACE}svg"
    assert root.get("role") == "img"
    assert [e.tag.removeprefix(NAMESPACE) for e in root][:2] == ["title", "desc"]
    return root


def named(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """Elements of a class, without those of the legend."""
    legend = {id(e) for g in root.iter() if g.get("class") == "legend" for e in g.iter()}
    return [
        e for e in root.iter() if name in (e.get("class") or "").split() and id(e) not in legend
    ]


def centre(drawn: ElementTree.Element) -> tuple[float, float]:
    if drawn.get("cx"):
        return float(drawn.get("cx")), float(drawn.get("cy"))
    points = [tuple(map(float, pair.split(","))) for pair in drawn.get("points").split()]
    return tuple(sum(p[k] for p in points) / len(points) for k in (0, 1))


def texts(root: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in root.iter(f"{NAMESPACE}text")]


def interval(name: str, value: float | None, style: int = 0) -> svg.Interval:
    low, high = (None, None) if value is None else (value - 0.4, value + 0.5)
    return svg.Interval(name, value, low, high, f"{value}", style)


def bar_values(root: ElementTree.Element) -> list[float]:
    """The signed lengths of bars."""
    return [
        float(e.get("width")) * (-1 if "down" in e.get("class") else 1) for e in named(root, "bar")
    ]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_inside(low, size, most):
    high = low + size
    found = ticks(low, high, most)
    step = min((b - a for a, b in pairwise(found)), default=size)
    assert len(found) <= most + 1
    assert len(found) >= most // 3
    assert all(low - 1e-4 * step <= value <= high + 1e-4 * step for value in found)
    assert len(found) < 2 or float(f"{step:.3e}"[0]) in (1, 2, 5)


@given(st.lists(st.floats(-1e4, 1e4), max_size=6))
def test_a_scale_holds_its_values_in_their_order(values):
    along = scale(values, 10, 350)
    places = [along.at(value) for value in sorted(values)]
    assert all(10 <= place <= 350 for place in places)
    assert places == sorted(places)
    numbers = [text for _, text in along.ticks(45)]
    assert len(set(numbers)) == len(numbers) >= 1


def test_numbers_for_people():
    assert [shown(v, 1, sign=True) for v in (1.26, -1.26, 0.01, -0.01)] == [
        "+1.3",
        "\N{MINUS SIGN}1.3",
        "0.0",
        "0.0",
    ]


def test_twenty_series_differ_without_colours():
    shapes = {mark(style, 0, 0).replace(f"s{style % len(SHAPES)}", "") for style in range(20)}
    assert len(shapes) == 20
    assert len(DASHES) == len(set(DASHES))


def test_what_is_cut_has_its_full_name_as_a_tooltip():
    name = "a class name that is longer than its column " * 3
    root = parsed(svg.bars([(name, 1.0), ("cat", -1.0)], **WORDS, label="points"))
    cut = next(e for e in root.iter(f"{NAMESPACE}text") if "…" in (e.text or ""))
    assert cut.find(f"{NAMESPACE}title").text == name
    assert text_width(cut.text) < 0.34 * WIDTH
    assert shortened("supcon:temperature=0.05", 130) == "supcon:t…ure=0.05"
    assert shortened("猫" * 30, 100).count("猫") < shortened("c" * 30, 100).count("c")


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_forest_plot_has_a_mark_and_an_interval_for_each_value(count):
    rows = [interval(f"entry {k}", (-1) ** k * k / 3, k) for k in range(count)]
    root = parsed(
        svg.forest([*rows, interval("no value", None)], **WORDS, label="points", band=0.5)
    )
    marks, lines = named(root, "mark"), named(root, "interval")
    assert len(marks) == len(lines) == count
    by_value = sorted(range(count), key=lambda k: rows[k].value)
    places = [float(lines[k].get("x1")) for k in by_value]
    assert places == sorted(places)
    assert [centre(m)[1] for m in marks] == sorted(centre(m)[1] for m in marks)
    (band,), (zero,) = named(root, "band"), named(root, "zero")
    middle = float(band.get("x")) + float(band.get("width")) / 2
    assert middle == pytest.approx(float(zero.get("x1")), abs=0.1)
    assert "no value" in texts(root)


def test_equal_and_infinite_values_are_no_trouble():
    rows = [
        interval("a", 0.0),
        interval("b", 0.0),
        svg.Interval("c", math.nan, -math.inf, 1.0, "?", 0),
    ]
    root = parsed(svg.forest(rows, **WORDS, label="points"))
    assert len(named(root, "mark")) == 2
    assert len(named(root, "interval")) == 2
    dots = [
        svg.Dot("a", 1.0, 1.0, "", 0),
        svg.Dot("a", 1.0, 1.0, "", 0),
        svg.Dot("a", None, 1.0, "", 0),
    ]
    assert len(named(parsed(svg.scatter(dots, **AXES)), "mark")) == 2
    assert named(parsed(svg.bars([("a", 0.0), ("b", None)], **WORDS, label="")), "bar")


@pytest.mark.parametrize("draw", [svg.scatter, svg.curves])
def test_empty_pictures_are_pictures(draw):
    assert named(parsed(draw([], **AXES)), "mark") == []
    assert named(parsed(svg.bars([], **WORDS, label="")), "bar") == []
    assert named(parsed(svg.forest([], **WORDS, label="")), "mark") == []


@pytest.mark.parametrize("count", [2, 8, 9, 20])
def test_a_scatter_names_its_series(count):
    rng = random.Random(count)
    dots = []
    for k in range(count):
        dots += [svg.Dot(f"entry {k}", rng.random(), rng.random(), "a run", k) for _ in range(3)]
        dots.append(svg.Dot(f"entry {k}", rng.random(), rng.random(), "mean", k, large=True))
    root = parsed(svg.scatter(dots, **AXES))
    marks = named(root, "mark")
    assert len(marks) == 4 * count
    assert all(e.find(f"{NAMESPACE}title") is not None for e in marks)
    assert [f"entry {k}" for k in range(count)] == [t for t in texts(root) if t.startswith("entry")]
    assert any(e.get("class") == "legend" for e in root.iter()) == (count > svg.LABELLED)


def test_labels_of_a_scatter_do_not_cover_one_another():
    dots = [svg.Dot(f"entry {k}", 1 + k / 50, 1.0, "mean", k, large=True) for k in range(8)]
    root = parsed(svg.scatter([*dots, svg.Dot("far", 2.0, 2.0, "a run", 9)], **AXES))
    labels = [e for e in root.iter(f"{NAMESPACE}text") if (e.text or "").startswith("entry")]
    boxes = []
    for label in labels:
        x, wide = float(label.get("x")), text_width(label.text)
        left = x - wide if label.get("text-anchor") == "end" else x
        boxes.append((left, float(label.get("y")) - 11, left + wide, float(label.get("y")) + 3))
    overlaps = [svg._overlap(a, b) for k, a in enumerate(boxes) for b in boxes[k + 1 :]]
    assert len(labels) == 8
    assert not any(overlaps)


def test_positions_of_a_scatter_follow_the_values():
    values = [(3.0, 0.1), (1.0, 0.4), (2.0, 0.2)]
    root = parsed(svg.scatter([svg.Dot("a", x, y, "", 0) for x, y in values], **AXES))
    places = [centre(e) for e in named(root, "mark")]
    assert sorted(range(3), key=lambda k: places[k][0]) == [1, 2, 0]
    assert sorted(range(3), key=lambda k: -places[k][1]) == [0, 2, 1]  # y grows downwards


def test_curves_have_a_thin_line_for_each_run_and_a_thick_one_for_the_mean():
    curves = [
        svg.Curve("ce", [[(1, 0.1), (2, 0.5)], [(1, 0.3), (2, 0.7)]], 0),
        svg.Curve("cone", [[(1, math.nan), (2, 0.6)], []], 1),
        svg.Curve("none", [], 2),
    ]
    root = parsed(svg.curves(curves, **AXES))
    assert len(named(root, "thin")) == 3
    (first, second, third) = named(root, "mean")
    assert len(first.get("points").split()) == 2
    assert second.get("stroke-dasharray") != first.get("stroke-dasharray")
    assert not third.get("points")
    heights = [float(e.get("points").split()[0].split(",")[1]) for e in named(root, "thin")[:2]]
    mean = float(first.get("points").split()[0].split(",")[1])
    assert mean == pytest.approx(sum(heights) / 2, abs=0.1)


def test_the_mean_of_lines_is_taken_where_all_of_them_are():
    assert svg.mean_line([[(0, 0.0), (4, 4.0)], [(1, 3.0), (3, 5.0)]]) == [(1, 2.0), (3, 4.0)]
    assert svg.mean_line([[(0, 1.0), (1, 1.0)], [(2, 1.0), (3, 1.0)]]) == []


def test_long_lines_are_thinned_and_keep_their_ends():
    line = [(float(k), math.sin(k)) for k in range(1000)]
    root = parsed(svg.curves([svg.Curve("ce", [line], 0)], **AXES))
    points = named(root, "thin")[0].get("points").split()
    assert len(points) == svg.MOST_POINTS
    assert [p.split(",")[0] for p in (points[0], points[-1])] == [
        p.split(",")[0] for p in (named(root, "mean")[0].get("points").split()[k] for k in (0, -1))
    ]


def test_bars_show_the_largest_differences_in_both_directions():
    values = [(f"class {k}", (k - 120) / 10) for k in range(200)]
    random.Random(0).shuffle(values)
    root = parsed(svg.bars(values, **WORDS, label="points"))
    lengths = bar_values(root)
    assert len(lengths) == 30
    assert lengths == sorted(lengths, reverse=True)
    assert sum(length > 0 for length in lengths) == 15
    shown_names = [t for t in texts(root) if t.startswith("class")]
    assert shown_names == [f"class {k}" for k in [*range(199, 184, -1), *range(14, -1, -1)]]


def test_bars_without_enough_of_one_side_do_not_fill_it():
    values = [(f"class {k}", float(k + 1)) for k in range(40)]
    assert len(bar_values(parsed(svg.bars(values, **WORDS, label="points")))) == 15
    assert len(bar_values(parsed(svg.bars(values[:30], **WORDS, label="points")))) == 30


def test_hostile_names_are_text():
    drawn = [
        svg.forest([interval(HOSTILE, 1.0)], title=HOSTILE, description=HOSTILE, label=HOSTILE),
        svg.bars([(HOSTILE, 1.0)], title=HOSTILE, description=HOSTILE, label=HOSTILE),
        svg.scatter([svg.Dot(HOSTILE, 1.0, 1.0, HOSTILE, 0, large=True)], **AXES),
        svg.curves([svg.Curve(HOSTILE, [[(1.0, 1.0)]], 0)], **AXES),
    ]
    for text in drawn:
        root = parsed(text)
        assert not [e for e in root.iter() if e.tag.endswith("script")]
        assert "</title></svg><script>" in "".join(root.itertext())
        assert not set(text) & {"\u202e", "\x00", "\ud800"}
        text.encode("utf-8")


def test_attributes_cannot_be_left():
    assert element("g", class_='"><script>') == '<g class="&quot;&gt;&lt;script&gt;"/>'
    assert element("g", Svg("<b/>"), "<b/>") == "<g><b/>&lt;b/&gt;</g>"
