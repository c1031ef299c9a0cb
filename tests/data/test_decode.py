"""Pixels of files in every colour mode and orientation, against values computed by hand."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from image_files import encoded, noise, raw_png, write
from PIL import Image

from nearkin.data.decode import BadImage, decoded
from nearkin.errors import ConfigError

EDGE = 16  # of the uniform test images: a whole JPEG block


def uniform(mode: str, value) -> Image.Image:
    return Image.new(mode, (EDGE, EDGE), value)


def over_white(colour, alpha: int):
    """Porter and Duff's `over` on white."""
    return tuple(c * alpha / 255 + 255 * (1 - alpha / 255) for c in colour)


def ycc(y: float, cb: float, cr: float):
    """JFIF 1.02, page 3."""
    return (
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    )


def inked(c: float, m: float, y: float, k: float):
    return tuple((255 - ink) * (255 - k) / 255 for ink in (c, m, y))


def lab_to_srgb(lightness: float, a: float, b: float):
    """CIE 15 with D50, Bradford's adaptation to D65, IEC 61966-2-1."""
    fy = (lightness + 16) / 116
    cube = [
        f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29)
        for f in (fy + a / 500, fy, fy - b / 200)
    ]
    xyz = np.array(cube) * [0.9642, 1.0, 0.8249]
    to_d65 = np.array(
        [
            [0.9555766, -0.0230393, 0.0631636],
            [-0.0282895, 1.0099416, 0.0210077],
            [0.0122982, -0.0204830, 1.3299098],
        ]
    )
    to_rgb = np.array(
        [
            [3.2404542, -1.5371385, -0.4985314],
            [-0.9692660, 1.8760108, 0.0415560],
            [0.0556434, -0.2040259, 1.0572252],
        ]
    )
    linear = np.clip(to_rgb @ to_d65 @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def palette_image(transparency=None) -> bytes:
    image = uniform("P", 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(image, "PNG", **options)


def adobe_cmyk(transform: int | None) -> bytes:
    """A CMYK JPEG whose stored samples are 255 - (40, 80, 120, 30). transform: of the Adobe marker, or no marker."""
    content = encoded(uniform("CMYK", (40, 80, 120, 30)), "JPEG", quality=100)
    marker = content.index(b"\xff\xee")
    assert content[marker + 4 : marker + 9] == b"Adobe"
    end = marker + 2 + int.from_bytes(content[marker + 2 : marker + 4])
    if transform is None:
        return content[:marker] + content[end:]
    return content[: end - 1] + bytes([transform]) + content[end:]


def sixteen_bit_rows(samples: list[int]) -> bytes:
    row = b"".join(sample.to_bytes(2) for sample in samples) * EDGE
    return (b"\0" + row) * EDGE


STORED = (255 - 40, 255 - 80, 255 - 120, 255 - 30)
LAB = (150, 40, -30)  # L as a byte, a and b signed
MODES = {
    "L": (encoded(uniform("L", 77), "PNG"), (77, 77, 77)),
    "L-jpeg": (encoded(uniform("L", 77), "JPEG"), (77, 77, 77)),
    "1": (encoded(uniform("1", 1), "PNG"), (255, 255, 255)),
    "P": (palette_image(), (40, 50, 60)),
    "P-transparent": (palette_image(transparency=b"\xff\x40"), over_white((40, 50, 60), 0x40)),
    "P-hidden": (palette_image(transparency=1), (255, 255, 255)),
    "P-gif": (encoded(uniform("RGB", (1, 200, 3)), "GIF"), (1, 200, 3)),
    "LA": (encoded(uniform("LA", (60, 128)), "PNG"), over_white((60, 60, 60), 128)),
    "L-keyed": (encoded(uniform("L", 77), "PNG", transparency=77), (255, 255, 255)),
    "RGB": (encoded(uniform("RGB", (1, 2, 3)), "BMP"), (1, 2, 3)),
    "RGB-keyed": (
        encoded(uniform("RGB", (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        (255, 255, 255),
    ),
    "RGBA": (encoded(uniform("RGBA", (200, 100, 0, 64)), "PNG"), over_white((200, 100, 0), 64)),
    "RGBA-hidden": (encoded(uniform("RGBA", (200, 100, 0, 0)), "PNG"), (255, 255, 255)),
    "RGBA-webp": (
        encoded(uniform("RGBA", (200, 100, 0, 64)), "WEBP", lossless=True),
        over_white((200, 100, 0), 64),
    ),
    "CMYK-tiff": (encoded(uniform("CMYK", (40, 80, 120, 30)), "TIFF"), inked(40, 80, 120, 30)),
    "CMYK-jpeg": (adobe_cmyk(0), inked(40, 80, 120, 30)),
    "CMYK-not-inverted": (adobe_cmyk(None), inked(*STORED)),
    "YCCK": (adobe_cmyk(2), inked(*ycc(*STORED[:3]), 30)),
    "YCbCr": (encoded(uniform("YCbCr", (120, 90, 160)), "TIFF"), ycc(120, 90, 160)),
    "LAB": (
        encoded(uniform("LAB", (LAB[0], LAB[1] + 128, LAB[2] + 128)), "TIFF"),
        lab_to_srgb(LAB[0] / 255 * 100, *LAB[1:]),
    ),
    "I;16": (encoded(uniform("I;16", 32896), "PNG"), (128, 128, 128)),
    "I;16B": (encoded(uniform("I;16B", 1000), "TIFF"), (4, 4, 4)),
    "I;16-max": (encoded(uniform("I;16", 65535), "PNG"), (255, 255, 255)),
    "I": (encoded(uniform("I", 32896), "TIFF"), (128, 128, 128)),
    "RGB-16-bit": (
        raw_png(2, 16, sixteen_bit_rows([257 * 10, 257 * 100, 257 * 250]), EDGE, EDGE),
        (10, 100, 250),
    ),
    "LA-16-bit": (
        raw_png(4, 16, sixteen_bit_rows([257 * 60, 257 * 128]), EDGE, EDGE),
        over_white((60,) * 3, 128),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_colour_that_was_meant(tmp_path, mode):
    content, expected = MODES[mode]
    write(tmp_path / "x.jpg", content)  # the name says nothing of the format
    pixels = decoded(tmp_path / "x.jpg", channels=3)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, EDGE, EDGE)
    wanted = torch.tensor([float(v) for v in expected])[:, None, None]
    assert (pixels.double() - wanted.clamp(0, 255)).abs().max() <= 2.01


def test_grey_images_are_luma(tmp_path):
    write(tmp_path / "x.png", encoded(uniform("RGB", (200, 100, 50)), "PNG"))
    pixels = decoded(tmp_path / "x.png", channels=1)
    assert pixels.shape == (1, EDGE, EDGE)
    assert set(pixels.flatten().tolist()) == {round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)}


def test_sixteen_bit_grey_keeps_its_range_and_its_colour_key(tmp_path):
    values = np.array([[0, 128, 129, 257], [40000, 65406, 65407, 65535]], dtype=np.uint16)
    write(tmp_path / "x.png", encoded(Image.fromarray(values), "PNG"))
    expected = [[round(v / 257) for v in row] for row in values.tolist()]
    assert decoded(tmp_path / "x.png", channels=1).tolist() == [expected]


def tiff(values: np.ndarray, bits: int, white_is_zero: bool) -> bytes:
    """TIFF 6.0, grey, one strip; 12-bit samples are packed, the most significant bits first."""
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values.flatten().tolist())
        strip = bytes(int(packed[at : at + 8], 2) for at in range(0, len(packed), 8))
    else:
        strip = values.astype("<u2").tobytes()
    height, width = values.shape
    photometric = 0 if white_is_zero else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1}
    tags |= {278: height, 279: len(strip)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


# Pillow opens no file of 12 bits whose white is 0.
@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_grey_tiffs_keep_their_range_whatever_their_bits_and_their_white(
    tmp_path, bits, white_is_zero
):
    most = 2**bits - 1
    values = np.array([[0, most // 4, most // 2, most // 2 + 9], [9, most - 9, most - 1, most]])
    write(tmp_path / "x.tif", tiff(values, bits, white_is_zero))
    shares = 1 - values / most if white_is_zero else values / most
    found = decoded(tmp_path / "x.tif", channels=1)[0].numpy()
    assert np.abs(found - 255 * shares).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_takes_little_memory(tmp_path, mode):
    """Each value is as in exact arithmetic. The limit is in bytes a pixel, most of which are Pillow's copies."""
    values = np.tile(np.arange(65536).reshape(256, 256), (4, 4))
    stored = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    Image.frombytes(mode, values.shape, stored.tobytes()).save(tmp_path / "x.tiff")
    path = tmp_path / "x.tiff"
    assert decoded(path, channels=1).numpy().tolist() == [((values + 128) // 257).tolist()]
    tracemalloc.start()
    decoded(path, channels=1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most / values.size < (13 if mode == "I" else 7)


def test_two_channels_are_no_choice(tmp_path):
    write(tmp_path / "x.png", encoded(noise(0), "PNG"))
    with pytest.raises(ConfigError, match="--channels 2"):
        decoded(tmp_path / "x.png", channels=2)


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Exif 2.32, table of tag 0x0112: which side of the visual image row 0 and column 0 are."""
    height, width = upright.shape[:2]
    rows, columns = range(height), range(width)
    if orientation >= 5:
        rows, columns = columns, rows
    place = {
        1: lambda i, j: (i, j),  # top, left
        2: lambda i, j: (i, width - 1 - j),  # top, right
        3: lambda i, j: (height - 1 - i, width - 1 - j),  # bottom, right
        4: lambda i, j: (height - 1 - i, j),  # bottom, left
        5: lambda i, j: (j, i),  # left, top
        6: lambda i, j: (j, width - 1 - i),  # right, top
        7: lambda i, j: (height - 1 - j, width - 1 - i),  # right, bottom
        8: lambda i, j: (height - 1 - j, i),  # left, bottom
    }[orientation]
    return np.array([[upright[place(i, j)] for j in columns] for i in rows])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_all_orientations_give_the_same_pixels(tmp_path, orientation, kind):
    small = np.array(noise(3, 2, 3))
    upright = np.kron(small, np.ones((16, 16, 1), np.uint8))  # whole JPEG blocks
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    stored = Image.fromarray(stored_as(upright, orientation))
    write(tmp_path / "x", encoded(stored, kind, exif=exif, **options))
    pixels = decoded(tmp_path / "x", channels=3)
    difference = pixels.int() - torch.from_numpy(upright).permute(2, 0, 1).int()
    assert difference.abs().max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photos_of_phones_are_read_upright(tmp_path, orientation):
    """HEIC, as iPhones store it."""
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    heif.register_heif_opener()
    upright = np.kron(np.array(noise(3, 2, 3)), np.ones((32, 32, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(stored_as(upright, orientation))
    write(tmp_path / "x.heic", encoded(stored, "HEIF", exif=exif.tobytes(), quality=-1, chroma=444))
    pixels = decoded(tmp_path / "x.heic", channels=3)
    difference = pixels.int() - torch.from_numpy(upright).permute(2, 0, 1).int()
    assert difference.abs().max() <= 4
    content = (tmp_path / "x.heic").read_bytes()
    for broken in (content[: len(content) // 2], content[:40]):
        write(tmp_path / "broken.heic", broken)
        with pytest.raises(BadImage):
            decoded(tmp_path / "broken.heic", channels=3)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0rubbish", b"\xff" * 40]
)
def test_a_broken_exif_block_costs_nothing_but_the_turn(tmp_path, exif):
    write(tmp_path / "x.jpg", encoded(uniform("RGB", (9, 9, 9)), "JPEG", exif=exif))
    assert decoded(tmp_path / "x.jpg", channels=3).float().mean() == 9


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, kind):
    first, second = uniform("RGB", (250, 5, 5)), uniform("RGB", (5, 5, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    write(tmp_path / "x", encoded(first, kind, save_all=True, append_images=[second], **options))
    assert decoded(tmp_path / "x", channels=3)[:, 0, 0].tolist() == [250, 5, 5]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1)])
def test_thin_images_are_images(tmp_path, height, width):
    write(tmp_path / "x.png", encoded(noise(0, height, width), "PNG"))
    assert decoded(tmp_path / "x.png", channels=3).shape == (3, height, width)


def test_threads_share_the_warning_filters_and_give_them_back(tmp_path):
    write(tmp_path / "x.jpg", encoded(noise(1), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: decoded(tmp_path / "x.jpg", channels=3), range(200)))
    assert warnings.filters == before
    assert all(torch.equal(image, images[0]) for image in images)
