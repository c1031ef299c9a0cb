"""Many small pictures in one file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nearkin.data.images import Arrays, Files
from nearkin.data.sources.listing import FileList
from nearkin.evaluation.sprite import sprite


def arrays(n, side, channels=3, flat=True):
    rng = np.random.default_rng(0)
    shape = (n, 1, 1, channels) if flat else (n, side, side, channels)
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    return Arrays(np.broadcast_to(values, (n, side, side, channels)).copy(), "a", channels)


def cell(found, place):
    number = found.cells[place]
    x, y = number % found.columns * found.side, number // found.columns * found.side
    sheet = Image.open(io.BytesIO(found.data)).convert("RGB")
    assert sheet.size == (found.columns * found.side, found.rows * found.side)
    return np.asarray(sheet.crop((x, y, x + found.side, y + found.side)))


def test_each_image_is_in_its_cell():
    source = arrays(30, 150)
    found = sprite([(source, row) for row in (5, 2, 29)])
    assert found.side == 112
    for place, row in enumerate((5, 2, 29)):
        colour = source.read(row)[:, 0, 0].numpy()
        assert np.abs(cell(found, place).mean((0, 1)) - colour).max() < 20


def test_many_pictures_are_smaller():
    source = arrays(300, 80)
    wanted = [(source, row) for row in range(300)]
    assert sprite(wanted).side == 80
    assert sprite(wanted, largest=300 * 64 * 64 // 4).side == 64


def test_small_images_are_exact():
    source = arrays(9, 8, channels=1, flat=False)
    found = sprite([(source, row) for row in range(9)])
    assert found.side == 8
    for row in range(9):
        assert np.array_equal(cell(found, row)[:, :, 0], source.read(row)[0].numpy())


def test_the_middle_of_a_wide_image(tmp_path):
    image = np.zeros((50, 150, 3), np.uint8)
    image[:, 50:100] = 200
    Image.fromarray(image).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = Files(FileList.pack(str(tmp_path), [b"broken.png", b"wide.png", b"missing.png"]))
    found = sprite([(files, 0), (files, 1), (files, 2)])
    assert found.cells == (-1, 0, -1)
    assert cell(found, 1).min() > 180


def test_the_file_keeps_its_limit():
    source = arrays(200, 64, flat=False)
    wanted = [(source, row) for row in range(200)]
    whole = sprite(wanted)
    found = sprite(wanted, largest=len(whole.data) // 3)
    assert len(found.data) <= len(whole.data) // 3
    kept = [number >= 0 for number in found.cells]
    assert kept == sorted(kept, reverse=True)  # the first ones
    assert 20 < sum(kept) < 200


def test_reading_ends_in_time():
    ticks = iter(range(100))
    source = arrays(500, 16)
    found = sprite([(source, row) for row in range(500)], seconds=3, clock=lambda: next(ticks))
    kept = sum(number >= 0 for number in found.cells)
    assert 0 < kept < 500


@pytest.mark.parametrize("wanted", [[], [(Files(FileList.pack("nowhere", [b"a.png"])), 0)]])
def test_without_a_picture(wanted):
    found = sprite(wanted)
    assert found.cells == (-1,) * len(wanted)
    Image.open(io.BytesIO(found.data)).load()
