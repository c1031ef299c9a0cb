"""One decode of every image, and all that the checks need of its pixels."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.decode import Header, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.look import examine, in_threads, shown
from nearkin.data.remembered import Remembered
from nearkin.doctor.inventory import Inventory
from nearkin.process import cores

SIDE = 64  # pixels a side of the sample, and about that of the image whose edges are looked at
NEAR_SIDE = 80  # pixels of a longest side that is near enough to SIDE
HASH_SIDE = 32  # pixels a side that a pHash is made of
CHUNK = 64  # images whose numbers are computed together, and in one task of a thread


class Pixels(NamedTuple):
    """Of one image. sample: 64 x 64 of its pixels, evenly spread, in grey. small: the whole image in grey, averaged,
    with a longest side of about 64 pixels, or its own; edges: of that. tiny: the same with 32 x 32 pixels. All bytes.
    """

    height: int
    width: int
    channels: int
    sample: bytes
    small: bytes
    edges: bytes
    tiny: bytes
    checksum: int


class Scan(NamedTuple):
    """Columns over N images; rows of images that cannot be read hold zeros.

    height, width: upright. mode: Pillow's name of the colours of the file. turned: whether EXIF turns it. dark, light,
    low_information, blurry: scores of cleanvision, low is bad. range: between the darkest and the brightest of the
    sampled pixels, in [0, 1]. identity: `[N, 2]`, equal for images with equal pixels. phash: 64 bits. reasons: row of
    each image that cannot be read -> why.
    """

    height: NDArray[np.int64]
    width: NDArray[np.int64]
    mode: NDArray[np.str_]
    turned: NDArray[np.bool_]
    dark: NDArray[np.float64]
    light: NDArray[np.float64]
    low_information: NDArray[np.float64]
    blurry: NDArray[np.float64]
    range: NDArray[np.float64]
    identity: NDArray[np.uint64]
    phash: NDArray[np.uint64]
    reasons: dict[int, str]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """`[N]`."""
        return self.height > 0


def scan(inventory: Inventory, *, quiet: bool = True) -> Scan:
    """Decode every image once, in a thread for each core. What is learned of files is remembered as by `look`, so that
    a run on the same images need not look at them again. quiet: without a bar on stderr."""
    total = len(inventory.labels)
    numbers = {
        name: np.zeros(total) for name in ("dark", "light", "low_information", "blurry", "range")
    }
    height, width = np.zeros(total, np.int64), np.zeros(total, np.int64)
    mode, turned = np.zeros(total, "U8"), np.zeros(total, np.bool_)
    identity, phash = np.zeros((total, 2), np.uint64), np.zeros(total, np.uint64)
    reasons: dict[int, str] = {}
    row = 0
    for chunk in shown(_opened(inventory), total, "images examined", quiet):
        found = [
            (row + place, pixels)
            for place, (pixels, _, _) in enumerate(chunk)
            if pixels is not None
        ]
        for place, (_, header, reason) in enumerate(chunk):
            if reason is not None:
                reasons[row + place] = reason
            if header is not None:
                mode[row + place], turned[row + place] = header.mode, header.orientation != 1
        row += len(chunk)
        if not found:
            continue
        rows = [place for place, _ in found]
        pixels = [each for _, each in found]
        height[rows] = [each.height for each in pixels]
        width[rows] = [each.width for each in pixels]
        identity[rows] = [_identity(each) for each in pixels]
        phash[rows] = perceptual_hashes(
            _joined(each.tiny for each in pixels).reshape(-1, HASH_SIDE, HASH_SIDE)
        )
        for name, values in _scores(pixels).items():
            numbers[name][rows] = values
    return Scan(
        height, width, mode, turned, **numbers, identity=identity, phash=phash, reasons=reasons
    )


Opened = tuple[Pixels | None, Header | None, str | None]


def _opened(inventory: Inventory) -> Iterator[list[Opened]]:
    """Pixels, header and what is wrong, of every image in order."""
    for part in inventory.splits.values():
        images = part.images
        if not isinstance(images, Files):
            for start in range(0, len(images), CHUNK):
                stop = min(start + CHUNK, len(images))
                yield [(reduced(images.read(row)), None, None) for row in range(start, stop)]
            continue
        channels = images.channels

        def opened(path: bytes, channels: int = channels) -> tuple[bytes, object, Opened]:
            image, fact, reason, header = examine(path, channels, full=True)
            pixels = None if image is None else reduced(image)
            return path, fact, (pixels, header, reason)

        paths = (images.key(row) for row in range(len(images)))
        with quiet_pillow, Remembered() as remembered:
            for chunk in in_threads(opened, paths, cores(), CHUNK):
                for path, fact, _ in chunk:
                    if fact is not None:
                        remembered.keep(path, fact)
                yield [each for _, _, each in chunk]


def reduced(image: Tensor) -> Pixels:
    """What the checks need of an image, uint8 `[C, H, W]`, C = 1 or 3."""
    from PIL import Image, ImageFilter

    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    height, width, channels = pixels.shape
    grey = Image.fromarray(pixels if channels == 3 else pixels[..., 0]).convert("L")
    sample = grey.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    # Averaging whole pixels is several times faster than resizing.
    small = grey.reduce(max(1, max(grey.size) // SIDE))
    if max(small.size) > NEAR_SIDE:
        small = small.resize(_fitting(small.size), Image.Resampling.BOX)
    return Pixels(
        height,
        width,
        channels,
        sample.tobytes(),
        small.tobytes(),
        small.filter(ImageFilter.FIND_EDGES).tobytes(),
        small.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR).tobytes(),
        zlib.crc32(pixels),
    )


def _fitting(size: tuple[int, int]) -> tuple[int, int]:
    """The size with a longest side of SIDE."""
    ratio = max(size) / SIDE
    return max(1, int(size[0] / ratio)), max(1, int(size[1] / ratio))


def _identity(pixels: Pixels) -> tuple[int, int]:
    """128 bits of the size, the checksum of all pixels and the small image."""
    digest = blake2b(pixels.tiny + pixels.sample, digest_size=16)
    digest.update(b"%d %d %d %d" % (pixels.height, pixels.width, pixels.channels, pixels.checksum))
    whole = digest.digest()
    return int.from_bytes(whole[:8], "little"), int.from_bytes(whole[8:], "little")


def perceptual_hashes(tiny: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The 64 bits of `imagehash.phash` of each of n images at once, from their `[n, 32, 32]` grey pixels.

    Bit (i, j) is whether the DCT coefficient of frequency (i, j), i and j in 0 ... 7, is above the median of the 64.
    """
    from scipy.fft import dctn

    low = dctn(tiny.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _scores(pixels: Sequence[Pixels]) -> dict[str, NDArray[np.float64]]:
    """The scores of n images, each `[n]` (see `Scan`), by the formulas of cleanvision 0.3.7 for brightness, entropy
    and edges, with its factors, but of 64 x 64 grey pixels of each image instead of all its coloured ones. An image of
    three equal channels has an entropy of log2(3) more than one of them."""
    images = len(pixels)
    sampled = _histograms(_joined(each.sample for each in pixels), np.full(images, SIDE**2))
    shares = sampled / SIDE**2
    below = shares.cumsum(1)
    low, high = ((below < part).sum(1) / 255 for part in (0.05, 0.99))
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
    entropy += np.log2([each.channels for each in pixels])
    sizes = np.array([len(each.small) for each in pixels])
    edges = _deviation(_histograms(_joined(each.edges for each in pixels), sizes))
    colourful = 1 - np.exp(
        -0.01 * _histograms(_joined(each.small for each in pixels), sizes).std(1)
    )
    blurry = 1 - np.exp(-0.01 * edges) + np.where(colourful > 0.18, colourful, 0)
    return {
        "dark": high,
        "light": 1 - low,
        "low_information": np.minimum(0.1 * entropy, 1),
        "blurry": np.minimum(blurry, 1),
        "range": ((below < 1 - 1e-9).sum(1) - (below < 1e-9).sum(1)) / 255,
    }


def _joined(parts: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(parts), np.uint8)


def _histograms(pixels: NDArray[np.uint8], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[n, 256]` of n images, one after the other in `pixels`."""
    images = len(sizes)
    places = pixels + np.repeat(256 * np.arange(images), sizes)
    return np.bincount(places, minlength=256 * images).reshape(images, 256)


def _deviation(histograms: NDArray[np.int64]) -> NDArray[np.float64]:
    """The standard deviation of the values that each histogram `[n, 256]` counts."""
    values = np.arange(256)
    total = histograms.sum(1)
    mean = histograms @ values / total
    deviation: NDArray[np.float64] = np.sqrt(
        np.maximum(histograms @ values**2 / total - mean**2, 0)
    )
    return deviation
