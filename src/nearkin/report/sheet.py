"""A sheet of small images as one SVG, which holds them itself."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.report.axes import FONT, LETTER, LINE, WIDTH, Svg, element, picture, words

SIDE = 96  # pixels that an image keeps at most; screens show about half of them
GAP = 6.0
LARGEST = 64.0  # width of a cell


class Cell(NamedTuple):
    """An image, uint8 `[H, W, 1]` or `[H, W, 3]`, and what it is in words."""

    pixels: NDArray[np.uint8]
    text: str


class Row(NamedTuple):
    """Images beside each other, below a line of text."""

    text: str
    cells: Sequence[Cell]


def sheet(rows: Sequence[Row], *, title: str, description: str, columns: Sequence[str]) -> Svg:
    """The rows below the names of the columns, and the description below them.

    columns: as many names as the longest row has cells; one that is empty belongs to the column before it.
    """
    side = min(LARGEST, (WIDTH - GAP * (len(columns) - 1)) / len(columns))
    lefts = [number * (side + GAP) for number in range(len(columns))]
    named = [(left, name) for left, name in zip(lefts, columns, strict=True) if name]
    ends = [left for left, _ in named[1:]] + [WIDTH]
    parts = [
        words(name, left, 12, room=end - left, class_="tick")
        for (left, name), end in zip(named, ends, strict=True)
    ]
    top = LINE + 4
    for row in rows:
        parts.append(words(row.text, 0, top + 12))
        parts += [
            _image(cell, left, top + LINE + 2, side)
            for left, cell in zip(lefts, row.cells, strict=False)
        ]
        top += LINE + 2 + side + GAP
    for line in textwrap.wrap(description, round(WIDTH / (LETTER * FONT))):
        parts.append(words(line, 0, top + 12, class_="tick"))
        top += LINE
    return picture(top, title, description, *parts)


def _image(cell: Cell, x: float, y: float, side: float) -> Svg:
    small = max(cell.pixels.shape[:2]) < SIDE // 2
    return element(
        "image",
        element("title", cell.text),
        x=x,
        y=y,
        width=side,
        height=side,
        href=data_uri(cell.pixels),
        style="image-rendering:pixelated" if small else "image-rendering:auto",
    )


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """An image as WebP in a `data:` address, shrunk to SIDE pixels; small ones keep every pixel."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    small = max(image.size) < SIDE
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=small, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
