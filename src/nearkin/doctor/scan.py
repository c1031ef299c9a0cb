"""One decode of every image, and all that the checks need of its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nearkin.data.decode import Header, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.look import examine, in_threads, shown
from nearkin.data.remembered import Fact, Remembered
from nearkin.doctor.inventory import Inventory
from nearkin.process import cores

SAMPLE = 32  # pixels a side of the sample that brightness and entropy are taken of
SIDE = 64  # pixels of the longest side of the image whose edges are looked at
HASH_SIDE = 32  # pixels a side that a pHash is made of
CHUNK = 64  # images whose numbers are computed together, and in one task of a thread
STEPS = np.arange(SAMPLE)
LUMA = np.array([19595, 38470, 7471], np.uint32)  # of red, green, blue, by ITU-R 601, times 2^16


class Pixels(NamedTuple):
    """Of one image. sample: uint8 `[32, 32, C]`, evenly spread pixels. small: uint8 `[h, w, C]`, the image averaged to
    a longest side of 64 pixels, or as it is where that is smaller."""

    height: int
    width: int
    sample: NDArray[np.uint8]
    small: NDArray[np.uint8]


class Numbers(NamedTuple):
    """Of n images, each `[n]`; see `Scan`. digest: of the small grey images; copies have the same one."""

    dark: NDArray[np.float64]
    light: NDArray[np.float64]
    low_information: NDArray[np.float64]
    blurry: NDArray[np.float64]
    range: NDArray[np.float64]
    phash: NDArray[np.uint64]
    digest: NDArray[np.uint64]


class Scan(NamedTuple):
    """Columns over N images; rows of images that cannot be read hold zeros.

    height, width: upright. mode: Pillow's name of the colours of the file. turned: whether EXIF turns it. dark, light,
    low_information, blurry: scores of cleanvision, low is bad. range: between the darkest and the brightest of the
    sampled pixels, in [0, 1]. identity: `[N, 2]`, equal for images with equal pixels; the second is
    computed of all pixels where the first, of the averaged image, is that of several. phash: 64 bits. reasons: row of
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
    dark, light, low, blurry, spread = np.zeros((5, total))
    numbers = Numbers(dark, light, low, blurry, spread, *np.zeros((2, total), np.uint64))
    height, width = np.zeros(total, np.int64), np.zeros(total, np.int64)
    mode, turned = np.zeros(total, "U8"), np.zeros(total, np.bool_)
    reasons: dict[int, str] = {}
    for start, chunk in _numbered(shown(_opened(inventory), total, "images examined", quiet)):
        rows, found = [], []
        for row, (pixels, header, reason) in enumerate(chunk, start):
            if reason is not None:
                reasons[row] = reason
            if header is not None:
                mode[row], turned[row] = header.mode, header.orientation != 1
            if pixels is not None:
                rows.append(row)
                found.append(pixels)
                height[row], width[row] = pixels.height, pixels.width
        for column, values in zip(numbers, measure(found), strict=True) if found else ():
            column[rows] = values
    identity = np.stack([numbers.digest, np.zeros(total, np.uint64)], axis=1)
    for number in _shared(identity[:, 0], height > 0):
        part, place = inventory.place(int(number))
        identity[number, 1] = _checksum(part.images.read(place))
    return Scan(height, width, mode, turned, *numbers[:5], identity, numbers.phash, reasons)


Opened = tuple[Pixels | None, Header | None, str | None]


def _numbered(chunks: Iterable[list[Opened]]) -> Iterator[tuple[int, list[Opened]]]:
    """Each chunk with the number of its first image."""
    start = 0
    with _one_thread():
        for chunk in chunks:
            yield start, chunk
            start += len(chunk)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of torch in each thread of ours, which would start a team of its own otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

        def opened(path: bytes, channels: int = channels) -> tuple[bytes, Fact | None, Opened]:
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
    pixels = image.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    ratio = max(height, width) / SIDE
    small = image
    if ratio > 1:
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        small = resized(image[None], size)[0]
    rows, columns = (STEPS * (side - 1) // (SAMPLE - 1) for side in (height, width))
    sample = pixels.take(rows, 0).take(columns, 1)
    return Pixels(height, width, sample, np.ascontiguousarray(small.permute(1, 2, 0).numpy()))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `[n, C, H, W]`, averaged over all pixels where it becomes smaller."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def measure(pixels: Sequence[Pixels]) -> Numbers:
    """The numbers of n images. Scores by the formulas of cleanvision 0.3.7 for brightness, entropy and edges, with its
    factors, but of fewer pixels: brightness and entropy of 32 x 32 of the image.

    An image of three equal channels has an entropy of log2(3) more than one of them.
    """
    images = len(pixels)
    sample = grey(np.stack([each.sample for each in pixels]))
    shares = _histograms(sample.reshape(images, -1)) / SAMPLE**2
    below = shares.cumsum(1)
    low, high = ((below < part).sum(1) / 255 for part in (0.05, 0.99))
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
    entropy += np.log2([each.sample.shape[2] for each in pixels])
    blurry, (phash, digest) = np.zeros(images), np.zeros((2, images), np.uint64)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, each in enumerate(pixels):
        shapes.setdefault(each.small.shape, []).append(place)
    for places in shapes.values():
        small = grey(np.stack([pixels[place].small for place in places]))
        blurry[places] = _sharpness(small)
        tiny = resized(torch.from_numpy(small)[:, None], (HASH_SIDE, HASH_SIDE))[:, 0].numpy()
        phash[places] = perceptual_hashes(tiny)
        digest[places] = [_digest(pixels[p], each) for p, each in zip(places, small, strict=True)]
    return Numbers(
        dark=high,
        light=1 - low,
        low_information=np.minimum(0.1 * entropy, 1),
        blurry=blurry,
        range=((below < 1 - 1e-9).sum(1) - (below < 1e-9).sum(1)) / 255,
        phash=phash,
        digest=digest,
    )


def grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[..., C]` to `[...]`, rounded as by Pillow."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0]
    red, green, blue = (pixels[..., colour].astype(np.uint32) for colour in range(3))
    sums = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + (1 << 15)
    found: NDArray[np.uint8] = (sums >> 16).astype(np.uint8)
    return found


def _sharpness(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The score of blur, `[n]`, of grey images `[n, h, w]`: from the deviation of their edges (9 times a pixel minus
    the sum of the 3 x 3 pixels around it, as by Pillow's FIND_EDGES) and of the counts of their greys."""
    edges = images.astype(np.int16)
    if min(images.shape[1:]) > 2:
        rows = edges[:, :-2] + edges[:, 1:-1] + edges[:, 2:]
        around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        edges[:, 1:-1, 1:-1] = (9 * edges[:, 1:-1, 1:-1] - around).clip(0, 255)
    sharp = 1 - np.exp(-0.01 * edges.std((1, 2), dtype=np.float32).astype(np.float64))
    spread = 1 - np.exp(-0.01 * _histograms(images.reshape(len(images), -1)).std(1))
    score: NDArray[np.float64] = np.minimum(sharp + np.where(spread > 0.18, spread, 0), 1)
    return score


def _histograms(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many of `[n, m]` pixels have each grey, `[n, 256]`."""
    places = pixels + 256 * np.arange(len(pixels), dtype=np.int32)[:, None]
    return np.bincount(places.ravel(), minlength=256 * len(pixels)).reshape(-1, 256)


def _digest(pixels: Pixels, small: NDArray[np.uint8]) -> int:
    text = b"%d %d %b" % (pixels.height, pixels.width, small.tobytes())
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def _shared(digests: NDArray[np.uint64], readable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The readable images whose digest another one has."""
    _, place, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return np.flatnonzero(readable & (counts[place.reshape(-1)] > 1))


def _checksum(image: Tensor) -> int:
    """64 bits of all pixels."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return int.from_bytes(blake2b(pixels.data, digest_size=8).digest(), "little")


def perceptual_hashes(tiny: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The 64 bits of `imagehash.phash` of each of n images at once, from their `[n, 32, 32]` grey pixels.

    Bit (i, j) is whether the DCT coefficient of frequency (i, j), i and j in 0 ... 7, is above the median of the 64.
    """
    from scipy.fft import dctn

    low = dctn(tiny.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
