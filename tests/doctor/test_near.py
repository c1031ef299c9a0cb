"""Near copies by features, and copies among JPEGs, which are decoded at a part of their size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tests.doctor.photos import photo, write_photos

from nearkin.data.look import examine
from nearkin.doctor.diagnose import diagnose
from nearkin.doctor.duplicates import find_copies
from nearkin.doctor.scan import SIDE, Scan

ORIENTATION = 0x0112


def scanned(hashes):
    """Images of usual size and brightness with these hashes."""
    count = len(hashes)
    numbers = np.ones((5, count))
    return Scan(
        np.full(count, 96),
        np.full(count, 96),
        np.full(count, "RGB"),
        np.zeros(count, np.bool_),
        *numbers,
        np.arange(count, dtype=np.uint64),
        np.array(hashes, np.uint64),
        {},
    )


@pytest.mark.parametrize(
    ("bits", "cosine", "near"),
    [(3, 0.99, True), (8, 0.96, True), (9, 1.0, False), (3, 0.9, False)],
)
def test_near_copies_have_like_hashes_and_like_features(bits, cosine, near):
    hashes = [0, (1 << bits) - 1, 0xFFFF_0000_FFFF_0000]
    features = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)], [1, 0]], np.float32)
    exact, found = find_copies(scanned(hashes), features)
    assert [group.tolist() for group in found.groups()] == ([[0, 1]] if near else [])
    assert exact.groups() == []


@pytest.mark.parametrize(("bits", "near"), [(4, True), (5, False)])
def test_without_features_hashes_must_be_more_alike(bits, near):
    _, found = find_copies(scanned([0, (1 << bits) - 1]), None)
    assert len(found.groups()) == near


@pytest.mark.parametrize(("cosine", "near"), [(0.99, True), (0.97, False)])
def test_without_features_pixels_confirm(cosine, near):
    """Photos of two things before one background have like hashes."""
    pixels = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]], np.float32)
    hashes = [0x5555_0000_FFFF_0000, 0, 1]
    _, found = find_copies(scanned(hashes), None, lambda rows: pixels[rows - 1])
    assert [group.tolist() for group in found.groups()] == ([[1, 2]] if near else [])


def look(data):
    report = diagnose(data, labels=False)
    found = {f.code: {file.path.rpartition("/")[2] for file in f.files} for f in report.findings}
    return {code: names for code, names in found.items() if names}


def test_a_jpeg_and_its_pixels_in_another_file_are_exact_copies(tmp_path):
    data = write_photos(tmp_path / "data")
    names = [f"{number}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        photo(100 + number, (400, 300)).save(data / "train/ant" / name, quality=90)
    Image.open(data / "train/ant/1.jpg").save(data / "train/ant/one.png")
    changed = np.array(Image.open(data / "train/ant/2.jpg"))
    changed[150, 200] ^= 1
    Image.fromarray(changed).save(data / "train/ant/two.png")
    found = look(data)
    assert found["exact-copies"] == {"1.jpg", "one.png"}
    assert found["near-copies"] == {"2.jpg", "two.png"}


def test_sizes_are_of_whole_images_that_are_upright(tmp_path):
    data = write_photos(tmp_path / "data")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo(100, (800, 200)).save(data / "train/ant/long.jpg", exif=exif)
    report = diagnose(data, labels=False)
    details = [file.detail for f in report.findings for file in f.files if f.code == "odd-shape"]
    assert details == ["200 x 800"]


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_is_found_at_a_part_of_the_size(tmp_path, progressive):
    place = tmp_path / "image.jpg"
    photo(0, (320, 320)).save(place, quality=90, progressive=progressive)
    whole, draw = place.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for _ in range(24):
        damaged = bytearray(whole)
        start = int(draw.integers(len(whole) // 8, len(whole) - 64))
        damaged[start : start + 8] = draw.bytes(8)
        place.write_bytes(damaged if draw.random() < 0.7 else damaged[:start])
        key = str(place).encode()
        reasons = [examine(key, 3, full=True, least=least).reason for least in (0, SIDE)]
        outcomes.append(reasons[0])
        assert reasons[0] == reasons[1]
    assert len(set(outcomes)) > 1
