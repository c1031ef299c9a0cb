"""The fast way to a JPEG's pixels is Pillow's: the same bits, and nothing accepted that Pillow refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nearkin.data import decode
from nearkin.data.decode import BadImage, decoded


def picture(mode: str = "RGB", width: int = 61, height: int = 43) -> Image.Image:
    """Smooth colours with edges, so that subsampling and rounding have something to do."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / a + y / b) * 100 + 128 for a, b in ((5, 9), (11, 4), (7, 7))]
    colours = np.stack(waves, 2).astype(np.uint8)
    colours[10:20, 15:30] = (255, 0, 10)
    return Image.fromarray(colours).convert(mode)


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.atleast_3d(np.asarray(image.convert("RGB")))


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 2},
    "low quality": {"quality": 5},
    "no YCbCr": {"keep_rgb": True},
}


@pytest.mark.parametrize("size", [(61, 43), (1, 1), (16, 9), (8, 8), (3, 200)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_pillows(kind, size):
    content = encoded(picture("RGB", *size), **KINDS[kind])
    ours = decode.decode_jpeg(content, 3)
    assert ours is not None, "the fast way was taken"
    assert np.array_equal(ours, by_pillow(content))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_files_too(tmp_path, channels):
    content = encoded(picture("L"))
    (tmp_path / "x.jpg").write_bytes(content)
    expected = by_pillow(content).transpose(2, 0, 1)[:channels]
    assert np.array_equal(decoded(tmp_path / "x.jpg", channels=channels).numpy(), expected)


@pytest.mark.parametrize(("mode", "channels"), [("CMYK", 3), ("RGB", 1)])
def test_what_would_differ_goes_by_pillow(mode, channels):
    with Image.open(io.BytesIO(encoded(picture(mode)))) as image:
        assert not decode.is_exact_jpeg(image, channels)


@pytest.mark.parametrize("part", ["the head", "the whole"])
@pytest.mark.parametrize("seed", range(60))
def test_damage_is_judged_as_pillow_judges_it(tmp_path, monkeypatch, seed, part):
    draw = np.random.default_rng(seed)
    content = bytearray(encoded(picture(), progressive=bool(seed % 2)))
    end = len(content) if part == "the whole" else content.index(b"\xff\xda")
    for place in draw.integers(2, end, draw.integers(1, 4)):
        content[place] = draw.integers(256)
    damaged = bytes(content[: draw.integers(len(content) // 2, len(content) + 1)])
    (tmp_path / "x.jpg").write_bytes(damaged)
    ours = outcome(tmp_path / "x.jpg")
    monkeypatch.setattr(decode, "is_exact_jpeg", lambda image, channels: False)
    pillows = outcome(tmp_path / "x.jpg")
    assert ours == pillows


@pytest.mark.parametrize(
    ("least", "side"), [(1, 30), (30, 30), (31, 60), (60, 60), (61, 90), (120, 120)]
)
def test_large_files_are_scaled_as_far_as_is_allowed(least, side):
    """240 x 320 by n/8; where Pillow knows the fraction as well, a power of two, the bits are Pillow's."""
    content = encoded(picture("RGB", 320, 240), subsampling=0)
    ours = decode.decode_jpeg(content, 3, least)
    assert ours.shape == (side, side * 4 // 3, 3)
    if side != 90:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (side * 4 // 3, side))
            assert np.array_equal(ours, np.asarray(image))


@pytest.mark.parametrize("least", [121, 240, 500])
def test_small_files_are_decoded_in_full(least):
    """Above a half it would save little or nothing."""
    content = encoded(picture("RGB", 320, 240))
    assert np.array_equal(decode.decode_jpeg(content, 3, least), by_pillow(content))


@pytest.mark.parametrize("least", [0, 40])
def test_scaled_files_are_turned_and_damage_is_told(tmp_path, least, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(content := encoded(picture("RGB", 320, 240), exif=turned()))
    image = decoded(tmp_path / "x.jpg", 3, least=least)
    assert image.shape == ((3, 80, 60) if least else (3, 320, 240))
    upright = by_pillow(encoded(picture("RGB", 320, 240)))[::-1].transpose(2, 1, 0)
    step = 4 if least else 1
    assert (image.float() - torch.tensor(upright[:, ::step, ::step].copy())).abs().mean() < 12
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match="truncated"):
        decoded(tmp_path / "x.jpg", 3, least=least)
    (tmp_path / "x.jpg").write_bytes(content)
    monkeypatch.setattr(decode, "MAX_PIXELS", 76_799)
    with pytest.raises(BadImage, match="more than 76799 pixels"):
        decoded(tmp_path / "x.jpg", 3, least=least)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def turned(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><r tiff:Orientation=\"6\"/></x:xmpmeta>"
# What may stand behind the first two bytes, and what comes of it.
HEADS = {
    "nothing": (b"", "upright"),
    "a colour profile": (segment(0xE2, b"ICC_PROFILE\0\1\1" + b"p" * 99), "upright"),
    "a comment": (segment(0xFE, b"\xff\xe1 Exif"), "upright"),
    "Exif": (segment(0xE1, turned()), "turned"),
    "Exif behind a comment": (segment(0xFE, b"x") + segment(0xE1, turned()), "turned"),
    "Exif behind padding": (b"\xff\xff" + segment(0xE1, turned()), "turned"),
    "XMP": (segment(0xE1, XMP), "turned"),
    "several images": (segment(0xE2, b"MPF\0II*\0"), "upright"),
    "Exif behind a mark": (b"\xff\xd5" + segment(0xE1, turned()), "turned"),
    "rubbish": (b"rubbish", "refused"),
}


@pytest.mark.parametrize("head", HEADS)
def test_orientation_is_found_wherever_it_stands(tmp_path, head):
    before, comes = HEADS[head]
    content = encoded(picture())
    (tmp_path / "x.jpg").write_bytes(content[:2] + before + content[2:])
    upright = by_pillow(content).transpose(2, 0, 1)
    as_they_lie = {"upright": upright, "turned": upright.transpose(0, 2, 1)[..., ::-1]}
    expected = as_they_lie[comes].tobytes() if comes in as_they_lie else b""
    assert outcome(tmp_path / "x.jpg")[1] == expected


def outcome(path) -> tuple[str, bytes]:
    """What is wrong, or the pixels."""
    try:
        return "", decoded(path, channels=3).numpy().tobytes()
    except BadImage as error:
        return error.reason, b""
