"""Decoded images in one memory-mapped file, which workers and ranks share."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.images import Files, Rows, in_channels

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
