"""One decode of every image, and all that the checks need of its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nearkin.data.decode import TURNS, Header, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.loader import WorkersDied, in_processes
from nearkin.data.look import examine, shown
from nearkin.data.remembered import Fact, Remembered
from nearkin.data.threads import in_threads
from nearkin.doctor.inventory import Inventory
from nearkin.errors import ConfigError
from nearkin.process import cores

SAMPLE = 32  # pixels a side of the sample that brightness and entropy are taken of
SIDE = 64  # pixels of the longest side of the image whose edges are looked at
CHUNK = 16  # images that are computed together; more do not fit in the cache of a core
TASK = 64  # images that a process examines at a time
AHEAD = 8  # tasks that each process does before they are wanted: the main process is busy as well
MOST_PROCESSES = 8
# When processes cannot be started, or one of them died.
REFUSED = (WorkersDied, ConfigError, OSError, ImportError, AssertionError, MemoryError)
MANY = 4000  # files from which processes examine them; below it they take longer to start than they save
LOOSE = 8  # bits in which the pHashes of a whole image and of one decoded at a part of its size may differ
DENSE = 16  # pixels per pixel of the small image, a side, that are averaged at most


class Pixels(NamedTuple):
    """Of one image. height, width: of the whole image, upright. partial: whether it was decoded at a part of that
    size. sample: uint8 `[32, 32]`, evenly spread grey pixels. small: uint8 `[h, w]`, the grey image averaged to a
    longest side of 64 pixels, or as it is where that is smaller."""

    height: int
    width: int
    channels: int
    partial: bool
    sample: NDArray[np.uint8]
    small: NDArray[np.uint8]


class Numbers(NamedTuple):
    """Of n images, each `[n]`; see `Scan`. digest: 32 bits of the small grey images; copies that were decoded alike
    have the same one."""

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
    sampled pixels, in [0, 1]. identity: equal for images with equal pixels; 64 bits of all pixels where several images
    could be equal, else 32 bits of the averaged image. phash: 64 bits. reasons: row of each image that cannot be read
    -> why.
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

    def without(self, rows: frozenset[int]) -> Scan:
        """As if these images were not there."""
        height = self.height.copy()
        height[list(rows)] = 0
        reasons = {row: reason for row, reason in self.reasons.items() if row not in rows}
        return self._replace(height=height, reasons=reasons)


def scan(inventory: Inventory, *, quiet: bool = True) -> Scan:
    """Decode every image once, on all cores. What is learned of files is remembered as by `look`, so that a run on the
    same images need not look at them again. quiet: without a bar on stderr."""
    total = len(inventory.labels)
    dark, light, low, blurry, spread = np.zeros((5, total))
    numbers = Numbers(dark, light, low, blurry, spread, *np.zeros((2, total), np.uint64))
    height, width = np.zeros(total, np.int64), np.zeros(total, np.int64)
    partial = np.zeros(total, np.bool_)
    mode, turned = np.zeros(total, "U8"), np.zeros(total, np.bool_)
    reasons: dict[int, str] = {}
    for start, chunk in _numbered(shown(_chunks(inventory), total, "images examined", quiet)):
        rows = []
        for row, (size, header, reason) in enumerate(chunk.images, start):
            if reason is not None:
                reasons[row] = reason
            if header is not None:
                mode[row], turned[row] = header.mode, header.orientation != 1
            if size is not None:
                rows.append(row)
                height[row], width[row], partial[row] = size
        for column, values in zip(numbers, chunk.numbers, strict=True) if rows else ():
            column[rows] = values
    identity, sizes = numbers.digest, height << 32 | width
    for number in _doubtful(identity, numbers.phash, sizes, partial):
        part, place = inventory.place(int(number))
        identity[number] = _checksum(part.images.read(place))
    return Scan(height, width, mode, turned, *numbers[:5], identity, numbers.phash, reasons)


Opened = tuple[Pixels | None, Header | None, str | None]


@dataclass(frozen=True)
class Chunk:
    """Of some images in order: (height, width, partial), header and what is wrong; and the numbers of those that can
    be read."""

    images: list[tuple[tuple[int, int, bool] | None, Header | None, str | None]]
    numbers: Numbers

    @classmethod
    def of(cls, images: list[Opened]) -> Chunk:
        sizes = [
            (pixels and (pixels.height, pixels.width, pixels.partial), header, reason)
            for pixels, header, reason in images
        ]
        return cls(sizes, measure([pixels for pixels, _, _ in images if pixels is not None]))

    def __len__(self) -> int:
        return len(self.images)


def _numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk]]:
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


def _chunks(inventory: Inventory) -> Iterator[Chunk]:
    """Every image, in order."""
    for part in inventory.splits.values():
        images = part.images
        if not isinstance(images, Files):
            for start in range(0, len(images), CHUNK):
                rows = range(start, min(start + CHUNK, len(images)))
                yield Chunk.of([(reduced(images.read(row)), None, None) for row in rows])
            continue
        with quiet_pillow, Remembered() as remembered:
            for facts, chunk in _on_all_cores(_Examiner(images)):
                for path, fact in facts:
                    remembered.keep(path, fact)
                yield chunk


Examined = tuple[list[tuple[bytes, Fact]], Chunk]


class _Examiner(Dataset[list[Examined]]):
    """Makes chunks of the rows of image files."""

    def __init__(self, images: Files) -> None:
        self.images = images

    def tasks(self, size: int, first: int = 0) -> list[range]:
        """The rows from `first` on, in order, `size` at a time."""
        count = len(self.images)
        return [range(start, min(start + size, count)) for start in range(first, count, size)]

    def __getitems__(self, rows: Sequence[int]) -> list[Examined]:
        return [self._chunk(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]

    def _chunk(self, rows: Sequence[int]) -> Examined:
        """What is to be remembered of the files, and what is in them."""
        facts, images = [], []
        for path in map(self.images.key, rows):
            image, fact, reason, header = examine(path, self.images.channels, full=True, least=SIDE)
            if fact is not None:
                facts.append((path, fact))
            pixels = None
            if image is not None and header is not None:
                pixels = reduced(image, _partial(image, header))
            images.append((pixels, header, reason))
        return facts, Chunk.of(images)


def _on_all_cores(examiner: _Examiner) -> Iterator[Examined]:
    """All chunks, in order. Python's lock is held for half of the time of a small image, so threads hardly help where
    there are many; they do what processes have no room or memory for, or may not do."""
    done = 0
    if len(examiner.images) >= MANY:
        workers, tasks = min(cores(), MOST_PROCESSES), examiner.tasks(TASK)
        try:
            for found in in_processes(examiner, tasks, workers, ahead=AHEAD):
                done += TASK
                yield from found
        except REFUSED:
            pass
    threads = in_threads(examiner.__getitems__, examiner.tasks(CHUNK, done), cores(), 1)
    yield from chain.from_iterable(chain.from_iterable(threads))


def _partial(image: Tensor, header: Header) -> tuple[int, int] | None:
    """The whole (height, width), upright, of an image that was decoded at a part of that size; None for others."""
    width, height = header[:2]
    if image.shape[-2] * image.shape[-1] == width * height:
        return None
    transposed, _ = TURNS.get(header.orientation, (False, ()))
    return (width, height) if transposed else (height, width)


def reduced(image: Tensor, whole: tuple[int, int] | None = None) -> Pixels:
    """What the checks need of an image, uint8 `[C, H, W]`, C = 1 or 3. whole: see `_partial`."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    (rows, columns, channels), partial = pixels.shape, whole is not None
    rows, columns = whole or (rows, columns)
    step = max(1, max(pixels.shape[:2]) // (DENSE * SIDE))
    pixels = pixels[::step, ::step]
    height, width = pixels.shape[:2]
    grey = Image.fromarray(
        np.ascontiguousarray(pixels if channels == 3 else pixels[..., 0])
    ).convert("L")
    sample = grey.resize((SAMPLE, SAMPLE), Image.Resampling.NEAREST)
    ratio = max(height, width) / SIDE
    if ratio > 1:
        shape = max(1, int(width / ratio)), max(1, int(height / ratio))
        small = grey.resize(shape, Image.Resampling.BOX)
    else:
        small = grey
    return Pixels(rows, columns, channels, partial, np.asarray(sample), np.asarray(small))


def measure(pixels: Sequence[Pixels]) -> Numbers:
    """The numbers of n images. Scores by the formulas of cleanvision 0.3.7 for brightness, entropy and edges, with its
    factors, but of fewer pixels: brightness and entropy of 32 x 32 of the image.

    An image of three equal channels has an entropy of log2(3) more than one of them.
    """
    if not pixels:
        return Numbers(*np.zeros((5, 0)), *np.zeros((2, 0), np.uint64))
    shares = _histograms(np.stack([each.sample for each in pixels])) / SAMPLE**2
    below = shares.cumsum(1)
    low, high = ((below < part).sum(1) / 255 for part in (0.05, 0.99))
    entropy = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)
    entropy += np.log2([each.channels for each in pixels])
    blurry, phash = np.zeros(len(pixels)), np.zeros(len(pixels), np.uint64)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, each in enumerate(pixels):
        shapes.setdefault(each.small.shape, []).append(place)
    for places in shapes.values():
        small = np.stack([pixels[place].small for place in places])
        blurry[places] = _sharpness(small)
        phash[places] = perceptual_hashes(small)
    return Numbers(
        dark=high,
        light=1 - low,
        low_information=np.minimum(0.1 * entropy, 1),
        blurry=blurry,
        range=((below < 1 - 1e-9).sum(1) - (below < 1e-9).sum(1)) / 255,
        phash=phash,
        digest=np.array([_digest(each) for each in pixels], np.uint64),
    )


def _sharpness(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The score of blur, `[n]`, of grey images `[n, h, w]`: from the deviation of their edges (9 times a pixel minus
    the sum of the 3 x 3 pixels around it, as by Pillow's FIND_EDGES) and of the counts of their greys."""
    edges = images.astype(np.int16)
    if min(images.shape[1:]) > 2:
        rows = edges[:, :-2] + edges[:, 1:-1] + edges[:, 2:]
        around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        edges[:, 1:-1, 1:-1] = (9 * edges[:, 1:-1, 1:-1] - around).clip(0, 255)
    flat = edges.reshape(len(edges), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    deviation = np.sqrt(np.einsum("nm,nm->n", flat, flat) / flat.shape[1])
    sharp = 1 - np.exp(-0.01 * deviation.astype(np.float64))
    spread = 1 - np.exp(-0.01 * _histograms(images).std(1))
    score: NDArray[np.float64] = np.minimum(sharp + np.where(spread > 0.18, spread, 0), 1)
    return score


def _histograms(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many pixels of each of n images have each grey, `[n, 256]`."""
    return np.stack([np.bincount(image.ravel(), minlength=256) for image in images])


def _digest(pixels: Pixels) -> int:
    return crc32(pixels.small.tobytes(), crc32(b"%d %d" % (pixels.height, pixels.width)))


def _doubtful(
    digests: NDArray[np.uint64],
    phashes: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    partial: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """The images that may equal another one, by what is known. sizes: 0 where one cannot be read.

    Copies that were decoded alike have one digest. Of a JPEG that was decoded at a part of its size and another file
    of the same size the pHashes are compared.
    """
    _, place, counts = np.unique(digests, return_inverse=True, return_counts=True)
    found = (sizes > 0) & (counts[place.reshape(-1)] > 1)
    parts = np.flatnonzero(partial)
    for row in np.flatnonzero((sizes > 0) & ~partial & np.isin(sizes, sizes[parts])):
        near = np.bitwise_count(phashes[parts] ^ phashes[row]) <= LOOSE
        same = parts[near & (sizes[parts] == sizes[row])]
        found[same] = True
        found[row] |= len(same) > 0
    return np.flatnonzero(found)


def _checksum(image: Tensor) -> int:
    """64 bits of all pixels."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return int.from_bytes(blake2b(pixels.data, digest_size=8).digest(), "little")


def perceptual_hashes(small: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64 bits of each of n grey images `[n, h, w]`; of images `[n, 32, 32]` those of `imagehash.phash`.

    Bit (i, j) is whether the DCT coefficient of frequency (i, j), i and j in 0 ... 7, is above the median of the 64.
    Low frequencies hardly depend on the size, so that images need not be reduced to 32 x 32 before.
    """
    rows, columns = map(_waves, small.shape[1:])
    low = (rows @ small.astype(np.float32) @ columns.T).reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


@cache
def _waves(side: int) -> NDArray[np.float32]:
    """The first eight cosines of a DCT, `[8, side]`."""
    angles = np.arange(8)[:, None] * (2 * np.arange(side) + 1) * (np.pi / (2 * side))
    waves: NDArray[np.float32] = np.cos(angles).astype(np.float32)
    return waves
