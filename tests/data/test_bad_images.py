"""Files that are no usable images: refused quickly, with a reason, and with nothing allocated."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, noise, raw_png, write
from PIL import EpsImagePlugin, Image

from nearkin.data import decode
from nearkin.data.decode import BadImage, decoded
from nearkin.errors import DataError

GOOD = {
    kind: encoded(noise(0, 48, 64), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
}


def reason(path) -> str:
    with pytest.raises(BadImage) as caught:
        decoded(path, channels=3)
    error = caught.value
    assert error.path == os.fspath(path)
    assert error.reason in str(error)
    assert "\n" not in str(error)
    return error.reason


def reason_of(tmp_path, content: bytes, **limits) -> str:
    write(tmp_path / "x.jpg", content)
    return reason(tmp_path / "x.jpg", **limits)


@pytest.mark.parametrize("kind", GOOD)
def test_half_a_file_is_refused(tmp_path, kind):
    assert reason_of(tmp_path, GOOD[kind][: len(GOOD[kind]) // 2])


@pytest.mark.parametrize("kind", sorted(set(GOOD) - {"GIF"}))  # a GIF without its end mark is whole
def test_two_missing_bytes_are_noticed(tmp_path, kind):
    assert reason_of(tmp_path, GOOD[kind][:-2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_the_reason_for_a_cut_file_is_truncation(tmp_path, kind):
    assert reason_of(tmp_path, GOOD[kind][:-20]) == "it is truncated"


@pytest.mark.parametrize("place", ["of the pixels", "checksum of the pixels", "end mark"])
def test_a_flipped_bit_in_a_png_is_noticed(tmp_path, place):
    content = bytearray(GOOD["PNG"])
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start])
    at = {"of the pixels": start + 40, "checksum of the pixels": start + 4 + length, "end mark": -1}
    content[at[place]] ^= 1
    assert "checksum" in reason_of(tmp_path, bytes(content))


@pytest.mark.parametrize(
    "content",
    [
        b"this is text\n" * 50,
        b"<!DOCTYPE html><html></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n",
        b"%PDF-1.4\n",
        b"8BPS\0\1" + bytes(40),
        b"SIMPLE  =                    T" + bytes(2880),
        b"\0",
        encoded(noise(0), "PPM"),
        encoded(noise(0), "ICO", sizes=[(8, 8)]),
    ],
)
def test_other_formats_are_refused_and_no_other_program_is_started(tmp_path, monkeypatch, content):
    def forbidden(*_, **__):
        raise AssertionError("Ghostscript was asked for")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", forbidden)
    monkeypatch.setattr(os, "posix_spawn", forbidden)
    assert "JPEG, PNG, WEBP, BMP, TIFF, GIF" in reason_of(tmp_path, content)


def test_an_empty_file(tmp_path):
    assert reason_of(tmp_path, b"") == "it is empty"


@pytest.mark.parametrize("side", [8001, 10_000, 14_000, 65_000])
def test_a_bomb_is_refused_by_its_header(tmp_path, side, monkeypatch):
    """64, 100, 196 and 4 225 megapixels, around and above Pillow's own two limits. No pixel is decoded."""
    for name in ("_by_pillow", "decode_jpeg"):
        monkeypatch.setattr(decode, name, lambda *_: pytest.fail("decoded"))
    content = raw_png(0, 8, bytes(1000), side, side)
    assert str(side) in (text := reason_of(tmp_path, content)) or "too many pixels" in text


def test_the_pixel_limit_is_exact(tmp_path, monkeypatch):
    write(tmp_path / "x.png", encoded(noise(0, 10, 10), "PNG"))
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    assert decoded(tmp_path / "x.png", channels=3).shape == (3, 10, 10)
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    assert reason(tmp_path / "x.png") == "10 x 10 are more than 99 pixels"


def test_the_byte_limit_is_exact(tmp_path, monkeypatch):
    content = GOOD["PNG"]
    write(tmp_path / "x.png", content)
    monkeypatch.setattr(decode, "MAX_BYTES", len(content))
    assert decoded(tmp_path / "x.png", channels=3).shape == (3, 48, 64)
    monkeypatch.setattr(decode, "MAX_BYTES", len(content) - 1)
    assert "larger than" in reason(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch, mode):
    whole = encoded(noise(0, 48, 64).convert(mode), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    write(tmp_path / "whole.jpg", whole)
    assert decoded(tmp_path / "whole.jpg", channels=3).shape == (3, 48, 64)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    monkeypatch.setattr(decode, "decode_jpeg", None)
    hostile = whole[:-2] + 600 * scan + whole[-2:]
    assert reason_of(tmp_path, hostile).startswith("it has more than 500 scans")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)
    assert reason(tmp_path / "x.png") == "it is larger than 64 MiB"


def test_a_text_chunk_bomb_is_refused(tmp_path):
    body = b"Comment\0\0" + zlib.compress(bytes(2**26))
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + body))
    content = GOOD["PNG"]
    cut = content.index(b"IDAT") - 4
    assert reason_of(tmp_path, content[:cut] + chunk + content[cut:])


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5), np.full((4, 4), np.nan)])
def test_floating_point_pixels_are_refused(tmp_path, values):
    content = encoded(Image.fromarray(values.astype(np.float32)), "TIFF")
    assert "floating-point" in reason_of(tmp_path, content)


@pytest.mark.parametrize("value", [70_000, -1])
def test_wide_integers_are_refused(tmp_path, value):
    content = encoded(Image.fromarray(np.full((4, 4), value, np.int32)), "TIFF")
    assert "32-bit" in reason_of(tmp_path, content)


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    try:
        assert reason(tmp_path / "pipe.jpg") == "it is no regular file"
        assert reason(tmp_path / "folder.jpg") == "it is no regular file"
        assert reason(tmp_path / "zero.jpg") == "it is no regular file"
        assert reason(tmp_path / "socket.jpg")
        assert reason(tmp_path / "dangling.jpg") == "no such file or directory"
        assert reason(tmp_path / "missing.jpg") == "no such file or directory"
    finally:
        listener.close()
    assert reason(str(tmp_path / "nul\0.jpg"))


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    write(tmp_path / "good.png", GOOD["PNG"])
    write(tmp_path / "half.png", GOOD["PNG"][:200])

    def count():
        return len(list(Path("/dev/fd").iterdir()))

    before = count()
    for _ in range(5):
        reason(tmp_path / "folder.jpg")
        reason(tmp_path / "half.png")
        decoded(tmp_path / "good.png", channels=3)
    assert count() == before


def test_a_bad_image_is_a_data_error_that_travels_between_processes():
    error = BadImage("a\n\udcff.jpg", "it is empty")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, DataError)
    assert copy.code == 3
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))
    assert str(copy) == "The image a\\n\\udcff.jpg cannot be used: it is empty."
