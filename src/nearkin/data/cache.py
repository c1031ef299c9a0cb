"""`--cache`: every image decoded and shrunk once, then read from memory or from a file that stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from torch import Tensor

from nearkin.data.builtin import cache_folder
from nearkin.data.dataset import Dataset
from nearkin.data.decode import BadImage, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.packed import MANIFEST, PIXELS, SIZES, Pack, Packed
from nearkin.data.steps import ResizeShortSide
from nearkin.errors import ConfigError, printable
from nearkin.files import write_atomic

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
