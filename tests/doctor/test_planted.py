"""Each fault that is planted in clean images is found, with its files, and nothing else is reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.doctor.photos import blurred, faint, one_colour, photo, write_photos

from nearkin.doctor.diagnose import diagnose


@pytest.fixture
def data(tmp_path):
    return write_photos(tmp_path / "data")


def look(data):
    return diagnose(data, labels=False)


def worrying(report):
    """Code -> names of the files concerned, of warnings and errors."""
    return {
        finding.code: {os.path.relpath(file.path, report.data) for file in finding.files}
        for finding in report.findings
        if finding.level != "ok"
    }


def test_nothing_is_reported_on_clean_data(data):
    report = look(data)
    assert worrying(report) == {}
    assert (report.errors, report.warnings, report.superfluous) == (0, 0, frozenset())
    assert (
        "3 classes; 36 train, 12 test images; 12 training images in a class"
        in report.findings[0].text
    )


def test_nothing_is_reported_on_clean_jpegs_in_different_sizes(tmp_path):
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for number in range(10):
            size = (100 + 37 * number, 90 + 11 * number)
            photo(10 * label + number, size).save(tmp_path / name / f"{number}.jpg")
    assert worrying(look(tmp_path)) == {}


def plant(data, name, image, **options):
    path = data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return {name}


IMAGES = {
    "blank": one_colour(130),
    "dark": faint(0, 40),
    "bright": faint(247, 256),
    "low-information": faint(0, 2).point(lambda value: 90 + 70 * value),
    "blurred": blurred(0),
    "tiny": photo(900, (20, 24)),
    "odd-shape": photo(901, (200, 45)),
    "huge": photo(902, (110, 100)),
}


@pytest.mark.parametrize("code", IMAGES)
def test_an_image_with_a_fault_is_found(data, code, monkeypatch):
    monkeypatch.setattr("nearkin.doctor.quality.HUGE", 10_000)
    planted = plant(data, "train/ant/planted.png", IMAGES[code])
    assert worrying(look(data)) == {code: planted}


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_sixteen_bit_grey_that_uses_fewer_bits_is_to_be_rescaled(data, bits):
    """Not to be deleted: it would train well once it is rescaled."""
    grey = np.random.default_rng(0).integers(0, 2**bits, (80, 96), dtype=np.uint16)
    Image.fromarray(grey).save(data / "train/ant/0.png")
    Image.fromarray(np.zeros((80, 96), np.uint16)).save(data / "train/ant/1.png")
    report = look(data)
    found = worrying(report)
    assert found.get("few-bits") == (None if bits == 16 else {"train/ant/0.png"})
    assert found["blank"] == {"train/ant/1.png"}
    assert "dark" not in found
    assert bits == 16 or any("rescale them to all 16" in each.text for each in report.findings)


def test_unreadable_images_are_errors_with_their_reason(data):
    (data / "train/ant/cut.png").write_bytes((data / "train/ant/0.png").read_bytes()[:300])
    (data / "test/bee/empty.jpg").write_bytes(b"")
    report = look(data)
    assert worrying(report) == {"unreadable": {"train/ant/cut.png", "test/bee/empty.jpg"}}
    assert report.errors == 1
    details = {Path(f.path).name: f.detail for f in report.findings[1].files}
    assert details == {"cut.png": "it is truncated", "empty.jpg": "it is empty"}
    assert len(report.superfluous) == 2


def test_only_unreadable_images(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    report = diagnose(tmp_path, forecast={})
    assert [f.code for f in report.findings if f.level == "error"] == ["unreadable"]


def test_turned_images_and_other_modes_are_told_without_a_warning(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = plant(data, "train/ant/turned.jpg", photo(903), exif=exif)
    modes = plant(data, "train/bee/alpha.png", photo(904).convert("RGBA"))
    modes |= plant(data, "train/cow/grey.png", photo(905).convert("L"))
    report = look(data)
    assert worrying(report) == {}
    found = {f.code: {os.path.relpath(x.path, data) for x in f.files} for f in report.findings}
    assert (found["turned"], found["colour-modes"]) == (turned, modes)
    text = next(f.text for f in report.findings if f.code == "colour-modes")
    assert "L 1, RGB 49, RGBA 1" in text
    assert "1 image become" in text


def test_a_class_that_is_grey_alone(data):
    for path in (data / "train/ant").iterdir():
        Image.open(path).convert("L").save(path)
    found = worrying(look(data))
    assert set(found) == {"grey-classes"}
    assert len(found["grey-classes"]) == 12


def test_classes_that_a_split_lacks_or_has_alone(data):
    shutil.rmtree(data / "test/ant")
    plant(data, "test/dog/0.png", photo(906))
    report = look(data)
    assert worrying(report) == {"missing-class": set(), "unknown-class": {"test/dog/0.png"}}
    texts = {f.code: f.text for f in report.findings}
    assert texts["missing-class"].startswith("1 class has no image in the split test: ant;")
    assert "the split test has 1 class that train has not: dog" in texts["unknown-class"]


def test_few_images(data):
    for path in sorted((data / "train/ant").iterdir())[1:]:
        path.unlink()
    report = look(data)
    texts = {f.code: f.text for f in report.findings if f.level == "warning"}
    assert texts["single-image"].startswith("1 class has a single training image: ant;")
    assert worrying(report)["single-image"] == {"train/ant/0.png"}
    assert texts["imbalance"].startswith("bee has 12 training images and ant has 1;")


def test_one_class(tmp_path):
    write_photos(tmp_path / "data", classes=("ant",))
    report = look(tmp_path / "data")
    assert set(worrying(report)) == {"one-class"}
    assert report.errors == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Ant", "colliding-names"),
        ("ants", "look-alike-names"),
        ("a-nt", "look-alike-names"),
        ("\u0430nt", "look-alike-names"),  # a Cyrillic a
    ],
)
def test_names_that_look_alike(data, name, code):
    for number in range(12):
        plant(data, f"train/{name}/{number}.png", photo(950 + number))
    plant(data, f"test/{name}/0.png", photo(990))
    assert set(worrying(look(data))) == {code}


def test_hidden_and_empty_folders(data):
    plant(data, "train/.ipynb_checkpoints/0.png", photo(907))
    (data / "train/empty").mkdir()
    (data / "README.txt").write_text("of no concern")
    (data / "train/ant/.DS_Store").write_bytes(b"of no concern")
    texts = [f.text for f in look(data).findings if f.level == "warning"]
    assert [text.split(":")[0] for text in texts] == [
        "1 folder in train without images is no class",
        "1 hidden folder holds images, which are ignored",
    ]
    assert "train/.ipynb_checkpoints" in texts[1]


def copied(data, old, new, **options):
    """The image again, in another file."""
    path = data / new
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(data / old).save(path, **options)
    return {old, new}


def test_exact_copies_of_one_class_whatever_their_files(data):
    files = copied(data, "train/ant/0.png", "train/ant/again.bmp")
    report = look(data)
    assert worrying(report) == {"exact-copies": files}
    assert {report.inventory.path(row) for row in report.superfluous} == {
        str(data / "train/ant/again.bmp")
    }


def test_exact_copies_under_two_labels(data):
    files = copied(data, "train/ant/0.png", "train/bee/again.png")
    report = look(data)
    assert worrying(report) == {"exact-two-classes": files}
    assert len(report.superfluous) == 2


def test_leakage_into_the_test_says_how_many(data):
    files = set()
    for number in range(3):
        files |= copied(data, f"test/ant/{number}.png", f"train/ant/leak{number}.png")
    report = look(data)
    assert worrying(report) == {"exact-leakage": files}
    assert report.errors == 1
    text = next(f.text for f in report.findings if f.code == "exact-leakage")
    assert text.startswith("3 of 12 test images have an exact copy in train")
    assert {Path(report.inventory.path(row)).stem[:4] for row in report.superfluous} == {"leak"}


def test_near_copies_of_each_kind(data):
    smaller = Image.open(data / "train/ant/0.png").resize((90, 75))
    planted = {
        "near-copies": {"train/ant/0.png"} | plant(data, "train/ant/small.png", smaller),
        "near-two-classes": copied(data, "train/bee/0.png", "train/cow/q.jpg", quality=80),
        "near-leakage": copied(data, "test/cow/0.png", "train/cow/r.jpg", quality=80),
    }
    report = look(data)
    assert worrying(report) == planted
    assert report.errors == 0
    assert "1 of 12 test images has a near copy in train" in str([f.text for f in report.findings])


def test_names_are_hostile(data):
    name = "<script>\n\x1b[31m"
    copied(data, "train/ant/0.png", f"train/ant/{name}.png")
    (data / f"train/{name}").mkdir()
    report = look(data)
    for finding in report.findings:
        assert len(finding.line().splitlines()) == 1
        assert "\x1b" not in finding.line()
    assert any(name in file.path for f in report.findings for file in f.files)
