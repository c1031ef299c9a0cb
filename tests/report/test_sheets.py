"""Contact sheets show the image and its kin where they belong."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.pictures import write_classes, write_image

import nearkin
from nearkin.errors import DataError
from nearkin.evaluation.originals import Originals
from nearkin.evaluation.results import KinImage, Prediction
from nearkin.report.sheet_folder import NAME, sheet_names
from nearkin.report.sheets import LARGE, SMALL, Card, Sheets, draw_sheet, fitted

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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on `photos`, from whose folder everything is called."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    options = {"model": "test_resnet", "image_size": 16, "objective": "ce", "epochs": 0}
    return tmp_path / nearkin.train("photos", out="run", report=False, **options).run


def test_a_sheet_of_many_kin_can_be_saved(run, tmp_path):
    sheets = Sheets(tmp_path / "sheets", ["photos/cat/0.png"], run)
    assert sheets.missing is None
    near = (KinImage("cat/0.png", "cat", 0.9),) * 2000
    sheets.write(0, replace(prediction(near), path="photos/cat/0.png"))
    with Image.open(tmp_path / "sheets" / "1-0.jpg") as sheet:
        assert sheet.height < 3000


def test_kin_have_no_pictures_where_data_leads_to_other_images(run, tmp_path, monkeypatch):
    name = "cat/0.png"
    expected = Originals(run).read(name)
    for place, change in (("copy", False), ("others", True)):
        shutil.copytree(tmp_path / "photos", tmp_path / place / "photos")
        if change:
            write_image(tmp_path / place / "photos" / name, number=99)
        monkeypatch.chdir(tmp_path / place)
        originals = Originals(run)
        if change:
            assert "with other images" in originals.missing
            with pytest.raises(DataError, match="with other images"):
                originals.read(name)
        else:
            assert torch.equal(originals.read(name), expected)


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
