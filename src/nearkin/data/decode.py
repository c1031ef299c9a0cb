"""One image file to pixels. Whatever is wrong with the file becomes a `BadImage` that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
import io
import os
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nearkin.data import decode as jpeg
from nearkin.errors import ConfigError, DataError, printable

SCAN, EXIF_OR_XMP, ICC_OR_MPF = 0xDA, 0xE1, 0xE2  # second bytes of markers
LENGTHLESS = range(0xD0, 0xDA)  # markers without a segment
COLOURS = {1: ("Gray",), 3: ("Gray", "YCbCr", "RGB")}  # that `decode` turns into so many channels


def plain(content: bytes, channels: int, max_pixels: int) -> NDArray[np.uint8] | None:
    """uint8 `[H, W, channels]` of a JPEG file of at most `max_pixels` that needs decoding and nothing else; None
    for every other, and where anything is wrong: that is Pillow's."""
    if not _is_plain(content):
        return None
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if height * width > max_pixels or colours not in COLOURS[channels]:
        return None
    return decode(content, channels)


def _is_plain(content: bytes) -> bool:
    """Whether no segment before the pixels may hold an orientation or more images. ITU-T T.81, B.1.1."""
    if not content.startswith(b"\xff\xd8"):
        return False
    place = 2
    while content[place : place + 1] == b"\xff" and place + 4 <= len(content):
        marker, start = content[place + 1], place + 4
        if marker == SCAN:
            return True
        images = marker == ICC_OR_MPF and content.startswith(b"MPF", start)
        if marker == EXIF_OR_XMP or images or not 0xC0 <= marker < 0xFF or marker in LENGTHLESS:
            return False
        place += 2 + int.from_bytes(content[place + 2 : start])
    return False


def decodes(image: Image, channels: int) -> bool:
    """Whether `decode` gives the pixels that Pillow would: grey made of colours is rounded differently."""
    return image.format == "JPEG" and (image.mode == "L" or (image.mode == "RGB" and channels == 3))


def decode(content: bytes, channels: int) -> NDArray[np.uint8] | None:
    """uint8 `[H, W, channels]` of a JPEG file whose size is known to be allowed; None where anything is wrong with it:
    Pillow then says what, or mends it.
    """
    return _decoded(content, channels)


def scaled(content: bytes, channels: int, least: int) -> NDArray[np.uint8] | None:
    """As `decode`, but at the smallest n/8 of its size, up to a half, that leaves both sides `least` pixels or more, if
    there is one: from the low frequencies of each block alone, which saves some of the time and changes pixels.
    """
    return _decoded(content, channels, min_height=least, min_width=least, min_factor=2)


def _decoded(content: bytes, channels: int, **options: int) -> NDArray[np.uint8] | None:
    import simplejpeg

    colours = "RGB" if channels == 3 else "GRAY"
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colours, **options)
    except ValueError:
        return None
    return pixels


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
ORIENTATION = 0x0112
# Orientation -> whether rows become columns, then which sides are mirrored.
TURNS = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}
PLAIN = {"1": "L", "L": "L"} | dict.fromkeys(("P", "RGB", "RGBX", "CMYK", "YCbCr"), "RGB")


class BadImage(DataError):
    """An image file that cannot be used. path: as it was given. reason: a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"The image {printable(self.path)} cannot be used: {printable(self.reason)}."

    def by_now(self) -> DataError:
        """The error for an image that passed the scan."""
        return DataError(
            f"{str(self).rstrip('.')}, though it could be read at the start; mend it, and start again."
        )


class _Refused(Exception):
    """A reason of ours, on its way into a BadImage."""


def check_channels(channels: int) -> None:
    """Raises ConfigError unless images can be had with so many channels."""
    if channels not in (1, 3):
        raise ConfigError(f"--channels {channels} is not possible; use 1 (grey), 3 (RGB) or auto.")


def read_image(
    path: str | os.PathLike[str],
    *,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """The pixels of an image file as uint8 `[channels, H, W]`, upright and contiguous.

    channels: 3 for RGB; 1 for grey, from colour by ITU-R 601 luma (Y = 0.299 R + 0.587 G + 0.114 B).
    EXIF orientation is applied. Transparent pixels are laid on white. 16-bit grey v becomes v / 257,
    rounded; 32-bit integers count as 16-bit where they fit. Of an animation the first frame is taken.
    Colour profiles are not applied, but CIELAB becomes sRGB.

    Raises BadImage for anything but a whole, regular JPEG, PNG, WEBP, BMP, TIFF or GIF file of at most
    `max_bytes` bytes and `max_pixels` pixels, and for floating-point pixels. Never waits on a pipe.
    """
    return decoded(path, channels, max_pixels, max_bytes).contiguous()


def decoded(
    path: str | os.PathLike[str],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    least: int = 0,
) -> Tensor:
    """As `read_image`, but in memory a pixel's colours lie side by side, as decoders leave them: resizing is
    fastest so. least: unless 0, large JPEG files are decoded at a fraction of their size (`jpeg.scaled`)."""
    check_channels(channels)
    name = os.fspath(path)
    try:
        content = _content(name, max_bytes)
        pixels = None if least else jpeg.plain(content, channels, min(max_pixels, MAX_PIXELS))
        if pixels is not None:
            return torch.from_numpy(pixels).permute(2, 0, 1)
        with _pillow_warnings:
            return _upright(content, channels, max_pixels, least)
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything when bytes are damaged
        raise BadImage(name, _reason(error)) from error


def _content(path: str, max_bytes: int) -> bytes:
    """All bytes of a regular file. Opening without blocking, then looking, leaves no moment to swap it."""
    flags = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # not every system has each
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("it is no regular file")
        if status.st_size == 0:
            raise _Refused("it is empty")
        if status.st_size > max_bytes:
            raise _Refused(f"it is larger than {max_bytes / 2**20:g} MiB")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)  # asking for more would allocate more
    finally:
        os.close(descriptor)


def _upright(content: bytes, channels: int, max_pixels: int, least: int) -> Tensor:
    """The first frame, turned as its EXIF block says."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:  # known from the header, before any pixel is allocated
            raise _Refused(f"{width} x {height} are more than {max_pixels} pixels")
        if image.format == "PNG":
            _check_sums(content)
        pixels = None
        if jpeg.decodes(image, channels):
            pixels = (
                jpeg.scaled(content, channels, least) if least else jpeg.decode(content, channels)
            )
        if pixels is None:
            image.load()
            flat = _eight_bit(image).convert("L" if channels == 1 else "RGB")
            pixels = np.atleast_3d(np.array(flat))
        return _turned(torch.from_numpy(pixels).permute(2, 0, 1), image)


def _check_sums(png: bytes) -> None:
    """Every chunk of a PNG is whole, up to its end mark. Pillow does not look at those of the pixels."""
    view = memoryview(png)
    start, name = 8, b""
    while name != b"IEND":
        end = start + 12 + int.from_bytes(view[start : start + 4])
        if end > len(png):
            raise _Refused("it is truncated")
        name = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise _Refused("it is damaged (a checksum does not match)")
        start = end


def _turned(pixels: Tensor, image: Image) -> Tensor:
    """The EXIF orientation undone. TIFF files were turned by Pillow while loading."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # a broken EXIF block says nothing of the orientation
        return pixels
    if not isinstance(orientation, int) or orientation not in TURNS:
        return pixels
    transposed, mirrored = TURNS[orientation]
    return (pixels.mT if transposed else pixels).flip(mirrored)


def _eight_bit(image: Image) -> Image:
    """Mode L or RGB from any mode that the formats can give."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_sixteen_bit(image)
    if image.mode == "F":
        raise _Refused(
            "its pixels are floating-point numbers of unknown range; save it with 8 bits"
        )
    if image.mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode not in PLAIN:
        raise _Refused(f"its colour mode {image.mode} is not supported")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        from PIL import ImageChops

        return ImageChops.invert(image).convert("RGB")  # only Adobe stores inks inverted
    return image.convert(PLAIN[image.mode])


def _from_sixteen_bit(image: Image) -> Image:
    """Pillow's own conversion would clip at 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _Refused("its 32-bit pixels do not fit 16 bits; save it with 8 or 16 bits")
    grey = (values + 128) // 257
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _from_lab(image: Image) -> Image:
    """CIELAB (D50) to sRGB."""
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # only an in-place conversion returns None
    return converted


def _on_white(image: Image) -> Image:
    from PIL import Image

    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def _reason(error: Exception) -> str:
    """A few words that follow "cannot be used: "."""
    from PIL import Image, UnidentifiedImageError

    text = " ".join(str(error).split())
    if isinstance(error, _Refused):
        return text
    if isinstance(error, UnidentifiedImageError):
        return f"it is no readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return "it has too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "it is truncated" if "truncated" in text.lower() else f"it is damaged ({text[:100]})"


class _PillowWarnings:
    """While any thread is inside: Pillow's warnings are silent, and those of huge images are errors.

    Whether an image is accepted must not depend on the filters of the program around it. The filters
    are global, and `warnings.catch_warnings` in two threads at once would leave them changed; so the
    first thread that enters sets them and the last that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        from PIL.Image import DecompressionBombWarning

        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("error", category=DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_pillow_warnings = _PillowWarnings()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Hold Pillow's warnings back over many images: cheaper than once per image."""
    with _pillow_warnings:
        yield
