"""One image file to pixels. Whatever is wrong with the file becomes a `BadImage` that says so."""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.errors import ConfigError, DataError, printable, to_install

if TYPE_CHECKING:
    from PIL.Image import Image

# Raise it with every change that accepts or refuses other files than before (see `decoder`).
DECODER = 3
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
MAX_SCANS = 500  # of a progressive JPEG; encoders write about ten, and each takes as long as decoding an image
SCAN = b"\xff\xda"
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
OPAQUE = {"1": "L", "L": "L"} | dict.fromkeys(("P", "RGB", "RGBX", "CMYK", "YCbCr"), "RGB")
# Modes whose images can all be converted; whether others (F, I) can depends on the pixels.
MODES = frozenset(OPAQUE) | {"LA", "PA", "RGBA", "LAB", "I;16", "I;16B", "I;16L"}
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b";"}
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
TIFF_PARTS = ((273, 279), (324, 325))  # tags of the offsets and lengths of strips and of tiles


class Header(NamedTuple):
    """Of an image as it is stored, before its orientation is applied. channels: of the file, 1 to 4. Of an
    image that was decoded also mode, Pillow's name of its colours, and orientation, by EXIF, 1 where it is upright.
    """

    width: int
    height: int
    channels: int
    mode: str = ""
    orientation: int = 1


class BadImage(DataError):
    """An image file that cannot be used. path: as it was given. reason: a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"The image {printable(self.path)} cannot be used: {printable(self.reason)}."

    def by_now(self) -> DataError:
        """The error for an image that was readable when the run started."""
        return DataError(
            f"{str(self).rstrip('.')}, though it could be read at the start; put it back, and start again, a training "
            "with --resume."
        )


class _Refused(Exception):
    """Becomes a BadImage with this text as the reason."""


def check_channels(channels: int) -> None:
    """Raises ConfigError unless images can be had with so many channels."""
    if channels not in (1, 3):
        raise ConfigError(f"--channels {channels} is not possible; use 1 (grey), 3 (RGB) or auto.")


def decoded(path: str | os.PathLike[str], channels: int, least: int = 0) -> Tensor:
    """The pixels of an image file as uint8 `[channels, H, W]`, upright. The channels of a pixel lie side by side in
    memory, as decoders leave them and resizing is fastest.

    channels: 3 for RGB; 1 for grey, from colour by ITU-R 601 luma (Y = 0.299 R + 0.587 G + 0.114 B).
    EXIF orientation is applied. Transparent pixels are laid on white. 16-bit grey v becomes v / 257,
    rounded; 32-bit integers count as 16-bit where they fit. Of an animation the first frame is taken.
    Colour profiles are not applied, but CIELAB becomes sRGB.
    least: unless 0, JPEG files are decoded at the smallest n/8 of their size, up to a half, that leaves both sides
    `least` pixels or more, if there is one: only the low frequencies of each block are decoded, which is faster and
    changes pixels.

    Raises BadImage for anything but a whole, regular file of one of `FORMATS` (or HEIF, with pillow-heif) of at most
    `MAX_BYTES` bytes and `MAX_PIXELS` pixels, for floating-point pixels, and for a JPEG of more than `MAX_SCANS` scans.
    Never waits on a pipe.
    """
    return _decode(os.fspath(path), channels, least)[0]


def from_pillow(image: Image, channels: int, name: str) -> Tensor:
    """The pixels of a Pillow image, as `decoded` gives those of a file.

    Raises BadImage, with `name` as its path, for more than `MAX_PIXELS` pixels or none, and for modes and damage that
    `decoded` refuses.
    """
    check_channels(channels)
    try:
        width, height = image.size
        if not 0 < width * height <= MAX_PIXELS:
            raise _Refused(f"{width} x {height} are not 1 to {MAX_PIXELS} pixels")
        with quiet_pillow:
            pixels = torch.from_numpy(_by_pillow(image, channels))
            return _turned(pixels.permute(2, 0, 1), _orientation(image))
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(name, _reason(error)) from error


def inspect(
    path: str | os.PathLike[str], *, channels: int, full: bool, least: int = 0
) -> tuple[Tensor | None, Header]:
    """The pixels of an image file that can be used, as from `decoded`, if they were needed to find out, and its header.

    full: decode it. Otherwise only its header is read, and its end checked: by the end marker
    (JPEG, PNG, GIF), or by the length that the header states (WEBP, BMP, TIFF). A file that does not pass is decoded,
    so that an image is refused for the same reasons as by `full`, though damaged pixels go unnoticed. least: see
    `decoded`; the whole file is read at any size, so that the same damage is found.

    Raises BadImage.
    """
    name = os.fspath(path)
    header = None if full else _quick_header(name)
    return _decode(name, channels, least) if header is None else (None, header)


def _decode(name: str, channels: int, least: int) -> tuple[Tensor, Header]:
    check_channels(channels)
    try:
        with _regular(name) as file:
            content = file.read(os.fstat(file.fileno()).st_size)  # all; more would allocate more
        with quiet_pillow:
            return _upright(content, channels, least)
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything when bytes are damaged
        raise BadImage(name, _reason(error)) from error


@contextmanager
def _regular(path: str) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Opened without blocking, then checked: it cannot be swapped."""
    flags = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # not every system has each
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("it is no regular file")
        if status.st_size == 0:
            raise _Refused("it is empty")
        if status.st_size > MAX_BYTES:
            raise _Refused(f"it is larger than {MAX_BYTES / 2**20:g} MiB")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _quick_header(path: str) -> Header | None:
    """The header of a file that seems to be whole, without its pixels; None where only decoding tells."""
    from PIL import Image

    try:
        with quiet_pillow, _regular(path) as file:
            image = Image.open(file, formats=_formats())
            width, height = image.size
            if image.mode not in MODES or width * height > MAX_PIXELS or not _whole(file, image):
                return None
            return Header(width, height, len(image.getbands()))
    except MemoryError:
        raise
    except Exception:  # decoding finds out what is wrong
        return None


def _whole(file: BinaryIO, image: Image) -> bool:
    """Whether a file has its end mark, or the length that it states."""
    size = file.seek(0, os.SEEK_END)
    if image.format in END_MARKS:
        mark = END_MARKS[image.format]
        file.seek(max(0, size - len(mark)))
        return file.read() == mark
    if image.format in ("WEBP", "BMP"):
        place, more = (4, 8) if image.format == "WEBP" else (2, 0)
        file.seek(place)
        return int.from_bytes(file.read(4), "little") + more <= size
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
        parts = [(tags[starts], tags[sizes]) for starts, sizes in TIFF_PARTS if starts in tags]
        return all(
            a + b <= size for starts, sizes in parts for a, b in zip(starts, sizes, strict=True)
        )
    return False


@cache
def _formats() -> tuple[str, ...]:
    """That Pillow may open: HEIF as well where pillow-heif is installed."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return FORMATS
    return (*FORMATS, "HEIF")


@cache
def decoder() -> bytes:
    """What decides which files can be used. What was remembered of files with another one is ignored."""
    parts = (DECODER, *_formats(), version("pillow"), version("simplejpeg"))
    return " ".join(map(str, parts)).encode()


def is_exact_jpeg(image: Image, channels: int) -> bool:
    """Whether `decode_jpeg` gives the pixels that Pillow would: grey from colours is rounded differently."""
    return image.format == "JPEG" and (image.mode == "L" or (image.mode == "RGB" and channels == 3))


def decode_jpeg(content: bytes, channels: int, least: int = 0) -> NDArray[np.uint8] | None:
    """uint8 `[H, W, channels]` of a JPEG file whose size is known to be allowed. least: see `decoded`.

    Returns None where anything is wrong with the file: Pillow gives the reason or repairs it.
    """
    import simplejpeg

    colours = "RGB" if channels == 3 else "GRAY"
    factor = 2 if least else 1
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, colours, min_height=least, min_width=least, min_factor=factor
        )
    except ValueError:
        return None
    return pixels


def _upright(content: bytes, channels: int, least: int) -> tuple[Tensor, Header]:
    """The first frame, turned as its EXIF block says."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:  # known from the header, before any pixel is allocated
            raise _Refused(f"{width} x {height} are more than {MAX_PIXELS} pixels")
        if image.format == "PNG":
            _check_sums(content)
        if "progressive" in image.info and content.count(SCAN) > MAX_SCANS:
            raise _Refused(
                f"it has more than {MAX_SCANS} scans, which would take minutes to decode"
            )
        mode, bands = image.mode, len(image.getbands())
        exact = is_exact_jpeg(image, channels)
        pixels = decode_jpeg(content, channels, least) if exact else None
        if pixels is None:
            pixels = _by_pillow(image, channels)
        turn = _orientation(image)
        header = Header(width, height, bands, mode, turn)
        return _turned(torch.from_numpy(pixels).permute(2, 0, 1), turn), header


def _by_pillow(image: Image, channels: int) -> NDArray[np.uint8]:
    image.load()
    flat = _eight_bit(image).convert("L" if channels == 1 else "RGB")
    return np.atleast_3d(np.array(flat))


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


def _orientation(image: Image) -> int:
    """By EXIF, 1 to 8. TIFF files were turned by Pillow while loading."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # a broken EXIF block says nothing of the orientation
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """The pixels upright."""
    if orientation == 1:
        return pixels
    transposed, mirrored = TURNS[orientation]
    return (pixels.mT if transposed else pixels).flip(mirrored)


@cache
def _greys(bits: int) -> NDArray[np.uint8]:
    """255 v / (2^bits - 1), rounded and at most 255, of every 16-bit grey v."""
    most = (1 << bits) - 1
    scaled = (255 * np.arange(65536) + most // 2) // most
    return np.minimum(scaled, 255).astype(np.uint8)


def _tiff_grey(image: Image) -> tuple[int, bool]:
    """Bits of a pixel and whether white is 0, of a grey image of more than 8 bits. Only TIFF has others than 16 and no,
    and Pillow leaves these to the caller."""
    if image.format != "TIFF":
        return 16, False
    tags = image.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
    bits = tags.get(BITS, (16,))[0]
    return (bits if 8 < bits < 16 else 16), tags.get(PHOTOMETRIC) == 0


def _eight_bit(image: Image) -> Image:
    """Mode L or RGB from any mode that the formats can give."""
    import PIL.Image
    from PIL import ImageChops, ImageCms

    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)  # Pillow's own conversion would clip at 255
        if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
            raise _Refused("its 32-bit pixels do not fit 16 bits; save it with 8 or 16 bits")
        bits, inverted = _tiff_grey(image)
        grey = _greys(bits)[values]
        if inverted:
            grey = 255 - grey
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return PIL.Image.fromarray(grey)
    if image.mode == "F":
        raise _Refused(
            "its pixels are floating-point numbers of unknown range; save it with 8 bits"
        )
    if image.mode == "LAB":  # CIELAB (D50) to sRGB
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only an in-place conversion returns None
        return converted
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = PIL.Image.new("RGBA", colours.size, "white")
        return PIL.Image.alpha_composite(white, colours).convert("RGB")
    if image.mode not in OPAQUE:
        raise _Refused(f"its colour mode {image.mode} is not supported")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return ImageChops.invert(image).convert("RGB")  # only Adobe stores inks inverted
    return image.convert(OPAQUE[image.mode])


def _reason(error: Exception) -> str:
    """A few words that follow "cannot be used: "."""
    from PIL import Image, UnidentifiedImageError

    text = " ".join(str(error).split())
    if isinstance(error, _Refused):
        return text
    if isinstance(error, UnidentifiedImageError):
        advice = "" if "HEIF" in _formats() else f"; to read .heic, {to_install('heic')}"
        return f"it is no readable {', '.join(_formats()[:-1])} or {_formats()[-1]} file{advice}"
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


quiet_pillow = _PillowWarnings()  # entering it for many images at once is cheaper than for each
