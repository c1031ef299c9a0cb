"""`--cache`: every image is decoded and shrunk once, then read from memory or from a file that stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.dataset import Dataset
from nearkin.data.decode import decoder, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.look import SAMPLE, Examined, examine
from nearkin.data.remembered import Remembered
from nearkin.data.sources.listing import Rows
from nearkin.data.threads import in_threads, statuses
from nearkin.data.transforms import ResizeShortSide
from nearkin.errors import ConfigError, printable
from nearkin.files import cache_folder, write_atomic

PIXELS, SIZES, MANIFEST = "pixels.bin", "sizes.npy", "cache.json"


class Pack:
    """A folder of packed images: `pixels.bin`, uint8 `[H, W, C]` one after the other; `sizes.npy`, their `[N, 2]`
    heights and widths, 0 for an image that could not be read; `cache.json`, what they are, written last.

    owner: given for a temporary folder, which is deleted with this object; an open file that is locked in it.
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
        # Mode "c" keeps writes in this process; torch warns of read-only arrays. As a plain array, since slicing a
        # memmap takes three times as long.
        return np.asarray(np.memmap(self.folder / PIXELS, np.uint8, mode="c"))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which maps the files itself."""
        return {"folder": self.folder, "channels": self.channels}

    def complete(self, key: str) -> bool:
        """Whether the folder holds all of the pack with this key."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            size = (self.folder / PIXELS).stat().st_size
        except (OSError, ValueError):
            return False
        return bool(manifest == {"key": key, "bytes": size})


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
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def name(self, row: int) -> str:
        return self.files.name(row)

    def identities(self) -> Iterable[bytes]:
        return self.files.identities()

    def take(self, rows: Rows) -> Self:
        index = np.asarray(rows, dtype=np.int64)
        return type(self)(self.files.take(index), self.pack, self.places[index])


Where = Literal["ram", "disk"]
FORMAT = 2
CHUNK = 16  # decoded images per task; 16 tasks or more may wait to be written
GIB = 2**30
DRAFT, OWNER = "nearkin-images-", "owner"
FRESH = 60.0  # seconds


class Made(NamedTuple):
    """A pack that was built or found. seconds: of building, 0 where it was there already. bad: absolute path of each
    image that cannot be read -> why."""

    pack: Pack
    seconds: float
    bad: Mapping[bytes, str]

    def __str__(self) -> str:
        size, how = self.pack.starts[-1] / GIB, f"built in {self.seconds:.1f} s"
        return (
            f"cache: {len(self.pack.sizes)} images, {size:.2f} GiB in {printable(str(self.pack.folder))}, "
            f"{how if self.seconds else 'found there'}"
        )


class Contents:
    """The files that a cache of some splits holds, each once, in the order of their absolute paths."""

    def __init__(self, splits: Mapping[str, Files], side: int) -> None:
        self.side, self.channels = side, next(iter(splits.values())).channels
        self.paths = sorted({f.key(row) for f in splits.values() for row in range(len(f))})
        self._shrink = ResizeShortSide(side)

    def image(self, path: bytes) -> Examined:
        """The image shrunk to a short side of `side`, uint8 `[C, H, W]`; smaller ones as they are."""
        found = examine(path, self.channels, full=True)
        if found.image is None or min(found.image.shape[-2:]) <= self.side:
            return found
        return found._replace(image=self._shrink(found.image))

    def key(self) -> str:
        """SHA-256 of everything that the pixels depend on: paths, sizes and times of the files, side, channels, and
        what decodes and shrinks them."""
        digest = hashlib.sha256(json.dumps([FORMAT, self.side, self.channels]).encode())
        digest.update(decoder() + version("torchvision").encode())
        for path, status in zip(self.paths, statuses(self.paths), strict=True):
            if status is not None:
                digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
            digest.update(path + b"\0")
        return digest.hexdigest()

    def estimate(self) -> int:
        """Bytes, from the headers of some evenly spread images."""
        sample = self.paths[:: max(1, len(self.paths) // SAMPLE)]
        facts = [examine(path, self.channels, full=False).fact for path in sample]
        sizes = [
            f.width * f.height * min(1.0, self.side / max(1, min(f.width, f.height))) ** 2
            for f in facts
            if f is not None
        ]
        return int(np.mean(sizes or [0]) * len(self.paths) * self.channels)

    def places(self, files: Files) -> NDArray[np.int64]:
        """Where in the cache each row of a split is."""
        return np.searchsorted(self.paths, [files.key(row) for row in range(len(files))])


def home(where: Where) -> Path:
    """The folder of caches. Raises DataError."""
    if where == "disk":
        return cache_folder()
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def room_in_memory() -> int:
    """Most bytes of a cache in memory that `--cache auto` chooses: a quarter of what is free, at most 2 GiB."""
    return min(2 * GIB, shutil.disk_usage(home("ram")).free // 4)


def make_pack(contents: Contents, where: Where, workers: int) -> Made:
    """The pack of `contents`: found on the disk, or built in `workers` threads. What is learned of the files is
    remembered as by `look`.

    Raises ConfigError when there is no room for it.
    """
    key, root = contents.key(), home(where)
    stays = Pack(root / f"images-{key[:16]}", contents.channels)
    if where == "disk" and stays.complete(key):
        found = Pack(stays.folder, contents.channels)
        bad = _reasons(contents, found)
        if bad is not None:
            return Made(found, 0.0, bad)
    started = time.monotonic()
    with _room(root, contents, where):
        if where == "disk" and stays.complete(key):
            shutil.rmtree(stays.folder)
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with _draft(root) as (draft, owner):
            bad = _write(contents, draft, key, workers)
            if where == "ram":
                stays = Pack(draft, contents.channels, owner)
            else:
                _publish(draft, owner, stays, key)
    return Made(stays, time.monotonic() - started, bad)


def _reasons(contents: Contents, pack: Pack) -> dict[bytes, str] | None:
    """Why the images are missing that could not be read when the pack was built; None where one can be read by now, as
    after the memory had run out."""
    found: dict[bytes, str] = {}
    for place in np.flatnonzero(pack.sizes[:, 0] == 0):
        path = contents.paths[place]
        reason = contents.image(path).reason
        if reason is None:
            return None
        found[path] = reason
    return found


def packed(dataset: Dataset, contents: Contents, pack: Pack) -> Dataset:
    """The data set with its files read from the pack."""
    splits = dict(dataset.splits)
    for name, files in dataset.files.items():
        images = Packed(files, pack, contents.places(files))
        splits[name] = splits[name]._replace(images=images)
    return dataset._replace(splits=splits)


@contextlib.contextmanager
def _room(root: Path, contents: Contents, where: Where) -> Iterator[None]:
    """Check for room first; a disk that fills up all the same is reported in the same words."""
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


def _write(contents: Contents, draft: Path, key: str, workers: int) -> dict[bytes, str]:
    """Fill the folder. Returns why images could not be read."""
    sizes = np.zeros((len(contents.paths), 2), dtype=np.int64)
    bad: dict[bytes, str] = {}
    threads = in_threads(contents.image, contents.paths, workers, CHUNK)
    with (
        (draft / PIXELS).open("wb") as file,
        quiet_pillow,
        Remembered() as remembered,
        contextlib.closing(threads) as images,
    ):
        for place, found in enumerate(chain.from_iterable(images)):
            path = contents.paths[place]
            if found.fact is not None:
                remembered.keep(path, found.fact)
            if found.image is not None:
                sizes[place] = found.image.shape[-2:]
                file.write(found.image.permute(1, 2, 0).contiguous().numpy().data)
            elif found.reason is not None:
                bad[path] = found.reason
        total = file.tell()
    with (draft / SIZES).open("wb") as file:
        np.save(file, sizes)
    write_atomic(draft / MANIFEST, json.dumps({"key": key, "bytes": total}).encode())
    return bad


@contextlib.contextmanager
def _draft(root: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new folder that only this user may enter, and a file in it that is locked until this process ends."""
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


def _publish(draft: Path, owner: BinaryIO, stays: Pack, key: str) -> None:
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
    """Delete what killed processes have left. A folder that has just changed may be one that nobody has locked yet."""
    for folder in root.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError), (folder / OWNER).open("r+b") as owner:
            if time.time() - folder.stat().st_mtime < FRESH:
                continue
            _lock(owner)
            shutil.rmtree(folder, ignore_errors=True)


def _lock(file: BinaryIO) -> None:
    """Raises OSError where another process holds the lock, or where there are no such locks (on Windows what a killed
    process has left stays)."""
    try:
        import fcntl
    except ImportError:
        raise OSError("no locks") from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
