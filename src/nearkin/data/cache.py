"""`--cache`: every image decoded and shrunk once, then read from memory or from a file that stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.dataset import Dataset
from nearkin.data.decode import BadImage, quiet_pillow
from nearkin.data.images import Files, Rows, in_channels
from nearkin.data.sources.builtin import cache_folder
from nearkin.data.transforms import ResizeShortSide
from nearkin.errors import ConfigError, printable
from nearkin.files import write_atomic

PIXELS, SIZES, MANIFEST = "pixels.bin", "sizes.npy", "cache.json"


class Pack:
    """A folder of packed images: `pixels.bin`, uint8 `[H, W, C]` one after the other; `sizes.npy`, their `[N, 2]`
    heights and widths; `cache.json`, what they are, written last.

    owner: the file that locks a folder which is to go when nothing refers to this object any more, and at the latest
    when the process ends.
    """

    def __init__(self, folder: Path, channels: int, owner: BinaryIO | None = None) -> None:
        self.folder, self.channels = folder, channels
        if owner is not None:
            weakref.finalize(self, _remove, folder, os.getpid(), owner)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        loaded: NDArray[np.int64] = np.load(self.folder / SIZES, allow_pickle=False)
        return loaded

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """`[N + 1]`, in bytes."""
        return np.cumsum([0, *(self.sizes.prod(1) * self.channels)], dtype=np.int64)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        # "c": what is written stays in this process; torch warns of arrays that cannot be written.
        # A plain array of the same memory: each slice of a memmap is one, and takes three times as long.
        return np.asarray(np.memmap(self.folder / PIXELS, np.uint8, mode="c"))

    @cached_property
    def together(self) -> NDArray[np.uint8] | None:
        """All as one `[N, H, W, C]`, if they are of one size."""
        if len(self.sizes) == 0 or (self.sizes != self.sizes[0]).any():
            return None
        return self.pixels.reshape(len(self.sizes), *self.sizes[0], self.channels)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which maps the files itself."""
        return {"folder": self.folder, "channels": self.channels}

    def complete(self, key: str) -> bool:
        """Whether the folder holds, whole, what `key` stands for."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            size = (self.folder / PIXELS).stat().st_size
        except (OSError, ValueError):
            return False
        return isinstance(manifest, dict) and (manifest.get("key"), manifest.get("bytes")) == (
            key,
            size,
        )


def _remove(folder: Path, process: int, owner: BinaryIO) -> None:
    owner.close()
    if os.getpid() == process:  # forked workers inherit the finalizer
        shutil.rmtree(folder, ignore_errors=True)


class Packed:
    """The images of `files` from a pack. places: `[n]`, where in the pack each row lies. As an image source it has the
    names and the identities of the files."""

    from_files = True

    def __init__(self, files: Files, pack: Pack, places: NDArray[np.int64]) -> None:
        self.files, self.pack, self.places = files, pack, places
        self.channels = files.channels

    def __len__(self) -> int:
        return len(self.places)

    def read(self, row: int) -> Tensor:
        place = self.places.item(row)
        start, end = self.pack.starts[place : place + 2].tolist()
        shape = (*self.pack.sizes[place].tolist(), self.pack.channels)
        pixels = self.pack.pixels[start:end].reshape(shape)
        return in_channels(torch.from_numpy(pixels).permute(2, 0, 1), self.channels)

    def stack(self, rows: Rows) -> Tensor | None:
        together = self.pack.together
        if together is None:
            return None
        pixels = np.take(together, self.places[np.asarray(rows)], axis=0)
        return in_channels(torch.from_numpy(pixels).permute(0, 3, 1, 2), self.channels)

    def name(self, row: int) -> str:
        return self.files.name(row)

    def identity(self, row: int) -> bytes:
        return self.files.identity(row)

    def take(self, rows: Rows) -> Self:
        index = np.asarray(rows, dtype=np.int64)
        return type(self)(self.files.take(index), self.pack, self.places[index])

    def with_channels(self, channels: int) -> Self:
        same = copy(self)
        same.files, same.channels = self.files.with_channels(channels), channels
        return same


Where = Literal["ram", "disk"]
FORMAT = 1
LOOKED_AT = 200  # images from which the size of the cache is estimated
CHUNK, AHEAD = 64, 16  # images per task; tasks that may wait for the writer
GIB = 2**30
DRAFT, OWNER = "nearkin-images-", "owner"


class Made(NamedTuple):
    """What was made or found. seconds: of building, 0 where it was there already."""

    pack: Pack
    seconds: float

    def __str__(self) -> str:
        size, how = self.pack.starts[-1] / GIB, f"built in {self.seconds:.1f} s"
        return (
            f"cache: {len(self.pack.sizes)} images, {size:.2f} GiB in {printable(str(self.pack.folder))}, "
            f"{how if self.seconds else 'found there'}"
        )


class Contents:
    """The files that a cache of a data set holds, each once, in the order of their paths, and the side they have."""

    def __init__(self, dataset: Dataset, side: int) -> None:
        sources = [s.images for s in dataset.splits.values() if isinstance(s.images, Files)]
        self.side, self.channels = side, dataset.channels
        self.paths = sorted({source.path(row) for source in sources for row in range(len(source))})
        self._files = Files("", self.paths, dataset.channels)
        self._shrink = ResizeShortSide(side)

    def image(self, row: int) -> Tensor:
        """uint8 `[C, H, W]`: shrunk to a short side of `side`; smaller ones as they are. Raises DataError."""
        try:
            image = self._files.read(row)
        except BadImage as error:
            raise error.by_now() from None
        return image if min(image.shape[-2:]) <= self.side else self._shrink(image)

    def key(self) -> str:
        """SHA-256 of everything that the pixels depend on: paths, sizes and times of the files, side and channels."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.side, self.channels]).encode())
        for path in self.paths:
            with contextlib.suppress(OSError):
                status = os.stat(path)  # noqa: PTH116 - called once per image
                digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
            digest.update(os.fsencode(path) + b"\0")
        return digest.hexdigest()

    def estimate(self) -> int:
        """Bytes, from some evenly spread images."""
        rows = range(0, len(self.paths), max(1, len(self.paths) // LOOKED_AT))
        return int(np.mean([self.image(row).numel() for row in rows]) * len(self.paths))


def home(where: Where) -> Path:
    """The folder that caches lie in. Raises DataError."""
    if where == "disk":
        return cache_folder()
    memory = Path("/dev/shm")  # each cache has a folder there that only we may enter
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def room_in_memory() -> int:
    """Bytes that a cache in memory may take without being asked for: a quarter of what is free, 2 GiB at most."""
    return min(2 * GIB, shutil.disk_usage(home("ram")).free // 4)


def make_pack(contents: Contents, where: Where, workers: int) -> Made:
    """The pack of `contents`: found on the disk, or made in `workers` threads.

    Raises ConfigError when there is no room for it, DataError for an image that can no longer be read.
    """
    key, root = contents.key(), home(where)
    stays = Pack(root / f"images-{key[:16]}", contents.channels)
    if where == "disk" and stays.complete(key):
        return Made(stays, 0.0)
    started = time.monotonic()
    with _room(root, contents, where):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with _draft(root) as (draft, owner):
            _write(contents, draft, key, workers)
            if where == "ram":
                stays = Pack(draft, contents.channels, owner)
            else:
                _put(draft, owner, stays, key)
    return Made(stays, time.monotonic() - started)


def packed(dataset: Dataset, contents: Contents, pack: Pack) -> Dataset:
    """The data set with its files read from the pack."""
    places = {path: place for place, path in enumerate(contents.paths)}
    splits = dict(dataset.splits)
    for name, split in splits.items():
        files = split.images
        if isinstance(files, Files):
            rows = np.array([places[files.path(row)] for row in range(len(files))], dtype=np.int64)
            splits[name] = split._replace(images=Packed(files, pack, rows))
    return dataset._replace(splits=splits)


@contextlib.contextmanager
def _room(root: Path, contents: Contents, where: Where) -> Iterator[None]:
    """Look for room first, and say the same where it ends all the same."""
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    needed, free = contents.estimate(), shutil.disk_usage(there).free
    other = "disk" if where == "ram" else "ram"
    advice = f"make room, or use --cache {other} or --cache off"
    if needed > free:
        raise ConfigError(
            f"--cache {where} needs about {needed / GIB:.2f} GiB in {printable(str(root))}, where "
            f"{free / GIB:.2f} GiB are free; {advice}."
        )
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--cache {where} cannot write to {printable(str(root))}: {error.strerror or error}; {advice}."
        ) from error


def _write(contents: Contents, draft: Path, key: str, workers: int) -> None:
    sizes: list[tuple[int, int]] = []
    with (draft / PIXELS).open("wb") as file, quiet_pillow():
        for image in _images(contents, workers):
            sizes.append((image.shape[-2], image.shape[-1]))
            file.write(image.permute(1, 2, 0).contiguous().numpy().data)
        total = file.tell()
    with (draft / SIZES).open("wb") as file:
        np.save(file, np.array(sizes, dtype=np.int64))
    write_atomic(draft / MANIFEST, json.dumps({"key": key, "bytes": total}).encode())


def _images(contents: Contents, workers: int) -> Iterator[Tensor]:
    """All images in order, decoded a little ahead of whoever writes them."""

    def some(start: int) -> list[Tensor]:
        return [contents.image(r) for r in range(start, min(start + CHUNK, len(contents.paths)))]

    starts = iter(range(0, len(contents.paths), CHUNK))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting = [pool.submit(some, start) for start in islice(starts, AHEAD)]
        while waiting:
            yield from waiting.pop(0).result()
            waiting += [pool.submit(some, start) for start in islice(starts, 1)]


@contextlib.contextmanager
def _draft(root: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new folder that only we may enter, and its lock, which the system lets go when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=DRAFT, dir=root))
    owner = (folder / OWNER).open("wb")
    try:
        with contextlib.suppress(OSError):
            _lock(owner)
        yield folder, owner
    except BaseException:
        owner.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _put(draft: Path, owner: BinaryIO, stays: Pack, key: str) -> None:
    """Give the draft its name, unless another process has just made the same."""
    owner.close()
    (draft / OWNER).unlink()
    if stays.folder.exists() and not stays.complete(key):
        shutil.rmtree(stays.folder)
    try:
        draft.rename(stays.folder)
    except OSError:
        if not stays.complete(key):
            raise
        shutil.rmtree(draft)


def _sweep(root: Path) -> None:
    """Remove what processes have left that were killed."""
    for folder in root.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError), (folder / OWNER).open("r+b") as owner:
            _lock(owner)
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: BinaryIO) -> None:
    """Raises OSError where another process holds the lock, or where there are no such locks (Windows: then what a
    killed process has left stays)."""
    try:
        import fcntl
    except ImportError:
        raise OSError("no locks") from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
