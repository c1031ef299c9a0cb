"""The training images of a run as pixels again, found by the names that its kin have."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, stored
from nearkin.data.decode import decoded
from nearkin.data.images import Arrays
from nearkin.data.sources.builtin import BUILTIN
from nearkin.data.sources.listing import ArrayList
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError


class Originals:
    """Reads training images from the run's DATA, as its config.yaml names them."""

    def __init__(self, run: Path) -> None:
        """Raises ModelError when the run has no config.yaml."""
        config = stored(RunConfig, run / CONFIG_FILE)
        self._data = config.data

    def read(self, name: str) -> Tensor:
        """uint8 `[3, H, W]` of a training image. Raises DataError where it is no longer there."""
        if self._rows is None:
            return decoded(self.path(name), 3)
        if name not in self._rows:
            raise DataError(f"{self._data} has no image {name}.")
        images, row = self._rows[name]
        return images.read(row)

    def path(self, name: str) -> str:
        """Where the file of a training image was, when DATA are files."""
        return os.path.join(self._root, name)  # noqa: PTH118 - a Path would normalise it

    @cached_property
    def _root(self) -> str:
        """Names are relative to a folder, or to the folder of a table."""
        if self._data in BUILTIN:
            root: str = resolve(self._data).parts["train"].images.root  # type: ignore[union-attr]
            return root
        return self._data if os.path.isdir(self._data) else os.path.dirname(self._data)  # noqa: PTH112, PTH120

    @cached_property
    def _rows(self) -> dict[str, tuple[Arrays, int]] | None:
        """Image and row of each name, where the images are arrays."""
        if self._data not in BUILTIN:
            return None
        listed = [part.images for part in resolve(self._data).parts.values()]
        arrays = [
            Arrays(images.array, images.prefix, 3, images.numbers)
            for images in listed
            if isinstance(images, ArrayList)
        ]
        found = {each.name(row): (each, row) for each in arrays for row in range(len(each))}
        return found or None
