"""Contact sheets: a JPEG for each image that shows it, its class probabilities and its nearest training images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nearkin.data.decode import decoded
from nearkin.errors import DataError, printable
from nearkin.evaluation.originals import Originals
from nearkin.evaluation.results import Prediction
from nearkin.files import write_atomic
from nearkin.report.browser import percent
from nearkin.report.sheet_folder import open_folder, sheet_names

WIDTH, MARGIN, LINE = 960, 24, 26
LARGE, SMALL, ACROSS = 300, 168, 5  # sides of the image and of its kin; kin in a row
MOST_KIN = 50  # on a sheet; a JPEG ends at 65 535 pixels
INK, FAINT, PAPER, BAR, SAME, OTHER = "#1b1b1b", "#6a6a6a", "white", "#3b6ea5", "#2e7d32", "#b3261e"
# Of systems, for letters that Pillow's own font lacks.
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


class Card(NamedTuple):
    """One of the kin. picture: None where the file is gone. same: whether it has the class of the prediction."""

    picture: Image.Image | None
    label: str
    similarity: float
    path: str
    same: bool


class Sheets:
    """The sheets of the files of one call, in `folder`, which is made or, after an earlier call, emptied. missing: why
    the kin have no pictures, None where they should have."""

    def __init__(self, folder: Path, files: Sequence[str], run: Path) -> None:
        """Raises ConfigError and SaveFailed as `open_folder`."""
        self._folder, self._names = folder, sheet_names(files)
        originals = Originals(run)
        self.missing = originals.missing
        open_folder(folder, self._names)

        @lru_cache(maxsize=512)  # neighbours come again
        def kin_picture(name: str) -> Image.Image | None:
            with suppress(DataError, OSError):
                return fitted(originals.read(name), SMALL)
            return None

        self._kin_picture = kin_picture

    def write(self, row: int, found: Prediction) -> None:
        """The sheet of the file at `row`; none for a file that cannot be read. Raises SaveFailed."""
        if found.error is not None:
            return
        try:
            picture = fitted(decoded(found.path, 3), LARGE)
        except DataError:  # gone since it was classified
            return
        cards = [
            Card(self._kin_picture(k.path), k.label, k.similarity, k.path, k.label == found.guess)
            for k in found.kin[:MOST_KIN]
        ]
        sheet = io.BytesIO()
        draw_sheet(picture, found, cards).save(sheet, "JPEG", quality=88)
        write_atomic(self._folder / self._names[row], sheet.getvalue())


def fitted(pixels: Tensor, side: int) -> Image.Image:
    """uint8 `[3, H, W]` as a picture of at most `side` pixels a side; small images are enlarged in whole steps."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    times = side // max(picture.size)
    if times > 1:
        return picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    picture.thumbnail((side, side))
    return picture


def draw_sheet(picture: Image.Image, found: Prediction, kin: Sequence[Card]) -> Image.Image:
    """picture: of at most `LARGE` pixels a side."""
    rows = -(-len(kin) // ACROSS)
    below = MARGIN + LARGE + MARGIN
    height = below + (rows and LINE + MARGIN // 2) + rows * (SMALL + 3 * LINE) + MARGIN // 2
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    _paste(sheet, picture, MARGIN, MARGIN, LARGE)
    left, top = 2 * MARGIN + LARGE, MARGIN
    for size, colour, text in _lines(found):
        _write(pen, (left, top), text, size, colour, WIDTH - left - MARGIN)
        top += round(1.35 * size)
    _bars(pen, found, left, top + 8)
    if kin:
        title = "nearest training images"
        if len(found.kin) > len(kin):
            title += f", the first {len(kin)} of {len(found.kin)}"
        _write(pen, (MARGIN, below), title, 17, INK, WIDTH - 2 * MARGIN)
    for place, card in enumerate(kin):
        x = MARGIN + place % ACROSS * (SMALL + 18)
        y = below + LINE + MARGIN // 2 + place // ACROSS * (SMALL + 3 * LINE)
        _draw_card(sheet, pen, card, x, y)
    return sheet


def _lines(found: Prediction) -> list[tuple[int, str, str]]:
    """Size, colour and text of the lines beside the image."""
    lines = [(15, FAINT, found.path), (30, INK, str(found.label))]
    if found.label != found.guess:
        lines.append((17, INK, f"would have been {found.guess}"))
    if found.unlike is not None:
        share = f"{percent(found.unlike)} of validation images"
        lines.append((17, INK, f"farther from its kin than {share}"))
    if found.set is not None:
        lines.append((17, INK, f"set: {', '.join(found.set)}"))
    return lines


def _bars(pen: ImageDraw.ImageDraw, found: Prediction, left: int, top: int) -> None:
    names, length = 180, WIDTH - left - MARGIN - 180 - 70
    for name, probability in found.top5:
        _write(pen, (left, top), name, 16, INK, names - 10)
        bar = left + names
        pen.rectangle((bar, top + 3, bar + max(1, round(length * probability)), top + 17), fill=BAR)
        end = bar + round(length * probability) + 8
        _write(pen, (end, top), f"{100 * probability:.1f} %", 16, FAINT, 70)
        top += LINE


def _draw_card(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Card, x: int, y: int) -> None:
    if card.picture is None:
        pen.rectangle((x, y, x + SMALL, y + SMALL), outline=FAINT)
        _write(pen, (x + 8, y + SMALL // 2 - 8), "file not found", 15, FAINT, SMALL - 16)
    else:
        _paste(sheet, card.picture, x, y, SMALL)
    colour = SAME if card.same else OTHER
    pen.rectangle((x, y + SMALL + 2, x + SMALL, y + SMALL + 5), fill=colour)
    text = f"{card.label}  {card.similarity:.3f}"
    _write(pen, (x, y + SMALL + 8), text, 16, INK, SMALL)
    _write(pen, (x, y + SMALL + 8 + LINE), card.path, 13, FAINT, SMALL)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, side: int) -> None:
    """In the middle of a square."""
    sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, room: int
) -> None:
    """One line, shortened in the middle to `room` pixels."""
    text = printable(text)
    font = _font(size, text.isascii())
    cut = text
    while len(cut) > 4 and pen.textlength(cut, font) > room:
        keep = min(len(cut) - 2, round(len(cut) * room / pen.textlength(cut, font)))
        cut = f"{text[: keep // 2]}…{text[len(text) - (keep - 1) // 2 :]}"
    pen.text(at, cut, fill=colour, font=font)


@lru_cache
def _font(size: int, plain: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in () if plain else FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
