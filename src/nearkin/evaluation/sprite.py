"""Small pictures of many images in one WebP file."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nearkin.data.decode import BadImage
from nearkin.data.images import Files, ImageSource

SIDES = (
    64,
    112,
)  # pixels of a small picture: of many, and of few; less where the images are smaller
DENSITY = 0.3  # bytes of a pixel, about
SHARP = 16  # pictures of at most so many pixels are stored without loss
LARGEST = 2_400_000  # bytes of the file
SECONDS = 8.0  # of reading images
QUALITY = 62
TOGETHER = 32


class Sprite(NamedTuple):
    """data: a WebP of square cells in rows of `columns`. side: pixels of a cell. cells: for each image that was asked
    for, the number of its cell, -1 where it has none."""

    data: bytes
    side: int
    columns: int
    rows: int
    cells: tuple[int, ...]


def sprite(
    wanted: Sequence[tuple[ImageSource, int]],
    *,
    largest: int = LARGEST,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Sprite:
    """The pictures of `wanted`, (source, row), the most important first, each the square in the middle of an image.

    Images that cannot be read have no cell, and the last ones neither, where reading takes more than `seconds` or the
    file would be larger than `largest` bytes.
    """
    end = clock() + seconds
    most = _most(len(wanted), largest)
    found: list[NDArray[np.uint8] | None] = []
    for pictures in _read(wanted, most):
        found += pictures
        if clock() > end:
            break
    known = [(place, picture) for place, picture in enumerate(found) if picture is not None]
    side = min(most, max((len(picture) for _, picture in known), default=1))
    while True:
        columns = max(1, math.ceil(math.sqrt(len(known))))
        rows = max(1, math.ceil(len(known) / columns))
        sheet = Image.new("RGB", (columns * side, rows * side))
        for cell, (_, pixels) in enumerate(known):
            picture = Image.fromarray(pixels)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (cell % columns * side, cell // columns * side))
        data = _encoded(sheet, lossless=side <= SHARP)
        if len(data) <= largest or len(known) <= 1:
            break
        known = known[: int(len(known) * min(0.9, 0.95 * largest / len(data)))]
    cells = {place: cell for cell, (place, _) in enumerate(known)}
    return Sprite(
        data, side, columns, rows, tuple(cells.get(place, -1) for place in range(len(wanted)))
    )


def _most(count: int, largest: int) -> int:
    """The side of a picture so that `count` of them are about `largest` bytes."""
    least, most = SIDES
    return max(least, min(most, int(math.sqrt(largest / (DENSITY * max(1, count))))))


def _encoded(sheet: Image.Image, *, lossless: bool) -> bytes:
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=2, lossless=lossless)
    return file.getvalue()


def _read(
    wanted: Sequence[tuple[ImageSource, int]], side: int
) -> Iterator[list[NDArray[np.uint8] | None]]:
    """The pictures, some at a time. Decoding leaves Python's lock, so that two threads use two cores."""
    scaled = {
        id(source): source.scaled(side) if isinstance(source, Files) else source
        for source, _ in wanted
    }
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(wanted), TOGETHER):
            some = wanted[start : start + TOGETHER]
            yield list(pool.map(lambda each: _small(scaled[id(each[0])], each[1], side), some))


def _small(source: ImageSource, row: int, most: int) -> NDArray[np.uint8] | None:
    """The middle square of an image, uint8 `[s, s, 3]` with s <= most, or None where it cannot be read."""
    try:
        image = source.read(row)
    except BadImage:
        return None
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    if side > most:
        square = square.resize((most, most), Image.Resampling.LANCZOS)
    return np.asarray(square)
