"""Images by row, from files or from arrays. Sources are picklable and small: every loader worker has a copy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.decode import check_channels, decoded
from nearkin.data.sources.listing import ArrayList, FileList, Rows
from nearkin.data.threads import statuses


class ImageSource(Protocol):
    """Images in a fixed order."""

    @property
    def channels(self) -> int:
        """Of every image that `read` gives: 1 or 3."""

    @property
    def from_files(self) -> bool:
        """Whether images are decoded from files, which is slow and can fail."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> Tensor:
        """uint8 `[channels, H, W]`. Raises BadImage."""

    def name(self, row: int) -> str:
        """The name to show for a row, unique in the source."""

    def identities(self) -> Iterable[bytes]:
        """Bytes that identify each image, in order: path and size of a file, the pixels in an array."""

    def take(self, rows: Rows) -> Self:
        """The source with only `rows`, in that order."""


class Files:
    """Image files. least: see `decoded`; 0 decodes in full."""

    from_files = True

    def __init__(self, files: FileList, channels: int = 3, least: int = 0) -> None:
        check_channels(channels)
        self.files, self.channels, self.least = files, channels, least
        # Links are not resolved: another target shows in the size and the time of the file. `..` stays, too: behind a
        # link it leads elsewhere than the text says.
        self._folder = os.fsencode(Path(files.root).absolute())

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        """The path relative to the root."""
        return self.files.name(row)

    def path(self, row: int) -> str:
        """The path to open."""
        return self.files.path(row)

    def key(self, row: int) -> bytes:
        """The absolute path, under which the file is remembered."""
        return os.path.join(self._folder, self.files.encoded(row))  # noqa: PTH118 - bytes

    def read(self, row: int) -> Tensor:
        return decoded(self.path(row), self.channels, least=self.least)

    def statuses(self) -> Iterable[tuple[bytes, os.stat_result | None]]:
        """The relative path of each file, and what the file system says of it now; None if there is none."""
        encoded = map(self.files.encoded, range(len(self)))
        return zip(encoded, statuses(self.files), strict=True)

    def identities(self) -> Iterable[bytes]:
        """The relative path and the size of each file; a size of -1 if there is none."""
        for path, status in self.statuses():
            yield path + b"\0%d" % (-1 if status is None else status.st_size)

    def take(self, rows: Rows) -> Self:
        return type(self)(self.files.take(rows), self.channels, self.least)

    def scaled(self, least: int) -> Self:
        """The source with large JPEG files decoded at a fraction of their size, `least` pixels or more a side."""
        return type(self)(self.files, self.channels, least)


class Arrays:
    """Images of one size in memory. array: uint8 `[N, H, W, C]`, C = 1 or 3. Names are `prefix/number`.

    channels: to convert to, by default C. numbers: `[N]`, by default 0 ... N - 1.
    """

    from_files = False

    def __init__(
        self,
        array: NDArray[np.uint8],
        prefix: str,
        channels: int | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.channels = array.shape[-1] if channels is None else channels
        check_channels(self.channels)
        self._array, self._prefix = np.ascontiguousarray(array), prefix
        self._numbers = np.arange(len(array)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._array)

    def name(self, row: int) -> str:
        return f"{self._prefix}/{self._numbers[row]}"

    def read(self, row: int) -> Tensor:
        """Grey from colour by ITU-R 601 in 16-bit fixed point, rounded as by Pillow, so that arrays and files give the
        same grey."""
        image = torch.from_numpy(self._array[row]).permute(2, 0, 1)
        if len(image) == self.channels:
            return image
        if self.channels == 3:
            return image.expand(3, -1, -1)
        weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)
        grey = (image.int() * weights[:, None, None]).sum(0, keepdim=True) + (1 << 15)
        return (grey >> 16).to(torch.uint8)

    def identities(self) -> Iterable[bytes]:
        return (image.tobytes() for image in self._array)

    def take(self, rows: Rows) -> Self:
        index = np.asarray(rows, dtype=np.int64)
        return type(self)(self._array[index], self._prefix, self.channels, self._numbers[index])


def open_images(listed: FileList | ArrayList, channels: int | Literal["auto"]) -> Files | Arrays:
    """The source of the images of a listed split. channels: auto is 1 for grey arrays and 3 for all else.

    Raises ConfigError for another number of channels.
    """
    if isinstance(listed, FileList):
        return Files(listed, 3 if channels == "auto" else channels)
    array, prefix, numbers = listed
    return Arrays(array, prefix, array.shape[-1] if channels == "auto" else channels, numbers)
