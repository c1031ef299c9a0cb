"""Contact sheets show the image and its kin where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nearkin.evaluation.results import KinImage, Prediction
from nearkin.report.sheet_folder import NAME, sheet_names
from nearkin.report.sheets import LARGE, SMALL, Card, draw_sheet, fitted

RED, GREEN = (200, 0, 0), (0, 200, 0)


def prediction(kin=(), **changes):
    top5 = (("cat", 0.75), ("dog", 0.25))
    return Prediction("a.png", "cat", 0.75, top5, None, 0.5, kin, "cat", **changes)


def pixels(sheet, colour):
    return int((np.abs(np.asarray(sheet).astype(int) - colour).max(2) < 8).sum())


def test_shows_the_image_its_kin_and_the_probabilities():
    near = [KinImage(f"{k}.png", "cat", 0.9) for k in range(6)]
    pictures = [Image.new("RGB", (SMALL, SMALL), GREEN)] * 5 + [None]
    cards = [
        Card(p, k.label, k.similarity, k.path, True) for p, k in zip(pictures, near, strict=True)
    ]
    sheet = draw_sheet(Image.new("RGB", (LARGE, LARGE), RED), prediction(tuple(near)), cards)
    assert pixels(sheet, RED) == LARGE**2
    assert pixels(sheet, GREEN) == 5 * SMALL**2
    bars = (np.abs(np.asarray(sheet).astype(int) - (0x3B, 0x6E, 0xA5)).max(2) < 8).sum(1)
    lengths = sorted({int(n) for n in bars if n > 20})
    assert lengths[-1] == pytest.approx(3 * lengths[0], rel=0.05)
    plain = draw_sheet(Image.new("RGB", (9, 9), RED), prediction(), [])
    assert pixels(plain, RED) == 81
    assert plain.height < sheet.height


@pytest.mark.parametrize("name", ["x" * 500, "\u202e\n\x1b[31m", "狗" * 90, "<svg onload=x>"])
def test_no_name_breaks_a_sheet(name):
    near = KinImage(name, name, 0.5)
    found = Prediction(name, "unknown", 1.0, ((name, 1.0),), None, 1.0, (near,), name, (name, name))
    sheet = draw_sheet(Image.new("RGB", (9, 9)), found, [Card(None, name, 0.5, name, False)])
    right = np.asarray(sheet)[:, -20:]
    assert (right == 255).all(), "nothing runs over the margin"


def test_names_of_sheets_are_plain_and_differ():
    files = ["../../x.png", "a/x.png", "b/x.png", "\n.png", "é", "-", "CON.png", "x" * 300]
    names = sheet_names(files)
    assert names[:3] == ["1-x.jpg", "2-x.jpg", "3-x.jpg"]
    assert len(set(names)) == len(files)
    assert all(NAME.fullmatch(name) and len(name) < 80 for name in names)
    assert sheet_names(["a"] * 10)[0] == "01-a.jpg"


def test_small_images_are_enlarged_and_large_ones_shrunk():
    small = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 2, 2)
    grown = np.asarray(fitted(small, 9))
    assert grown.shape == (8, 8, 3)
    assert (grown[:4, :4] == small[:, 0, 0].numpy()).all()
    assert fitted(torch.zeros(3, 500, 1000, dtype=torch.uint8), 100).size == (100, 50)
