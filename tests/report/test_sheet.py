"""A sheet of images: one file that holds them, with names as text."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from nearkin.report.axes import WIDTH
from nearkin.report.sheet import Cell, Row, data_uri, sheet


def grey(side=8):
    return np.full((side, side, 1), 90, dtype=np.uint8)


def drawn(rows, columns):
    text = sheet(rows, title="T <i>", description="D " * 90, columns=columns)
    return ElementTree.fromstring(text)


def named(root, name):
    return [e for e in root.iter() if e.tag.endswith("}" + name)]


def test_all_is_inside_the_picture_and_nothing_overlaps():
    rows = [Row(f"row {n}", [Cell(grey(), "x")] * (7 - n)) for n in range(3)]
    root = drawn(rows, ["first", "others", *[""] * 5])
    _, _, width, height = map(float, root.get("viewBox").split())
    boxes = [[float(e.get(k)) for k in ("x", "y", "width", "height")] for e in named(root, "image")]
    assert len(boxes) == 7 + 6 + 5
    assert all(x >= 0 and x + w <= width + 0.1 and y + h <= height for x, y, w, h in boxes)
    for n, (x, y, w, h) in enumerate(boxes):
        apart = [x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in boxes[:n]]
        assert all(apart)
    texts = named(root, "text")
    assert max(float(e.get("y")) for e in texts) <= height
    assert width == WIDTH


def test_a_name_of_a_column_reaches_to_the_next_name():
    root = drawn([], ["anchor", "a rather long name of others", *[""] * 5])
    words = ["".join(e.itertext()) for e in named(root, "text")]
    assert words[:2] == ["anchor", "a rather long name of others"]


def test_names_are_text():
    hostile = '</text><script>x</script>" onload="y'
    root = drawn([Row(hostile, [Cell(grey(), hostile)])], ["one"])
    assert named(root, "script") == []
    assert [e.get("onload") for e in root.iter() if e.get("onload")] == []
    assert named(named(root, "image")[0], "title")[0].text == hostile


@pytest.mark.parametrize("shape", [(8, 8, 1), (31, 40, 3)])
def test_small_images_keep_every_pixel(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(pixels).split(",")[1])))
    assert (np.asarray(shown) == pixels).all()


def test_large_images_are_shrunk():
    pixels = np.full((300, 200, 3), 90, dtype=np.uint8)
    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(pixels).split(",")[1])))
    assert shown.size == (64, 96)
