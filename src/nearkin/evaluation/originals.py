"""The training images of a run as pixels again, found by the names that its kin have."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, stored
from nearkin.data.decode import decoded
from nearkin.data.images import Arrays
from nearkin.data.sources.builtin import BUILTIN, list_builtin
from nearkin.data.sources.listing import ArrayList, Listing
from nearkin.errors import DataError
from nearkin.evaluation.own_data import own_listing, place_of, stored_origin


class Originals:
    """Reads training images from the run's DATA, as its config.yaml names them. missing: why there are none, None
    where they are looked for."""

    def __init__(self, run: Path) -> None:
        """Raises ModelError when the run has no config.yaml."""
        self._data = stored(RunConfig, run / CONFIG_FILE).data
        self.missing: str | None = None
        origin = stored_origin(run)
        if self._data in BUILTIN or origin is None or place_of(self._data) == origin.place:
            return
        try:  # in another folder a relative path may lead to other images
            own_listing(self._data, origin, "call nearkin there to see them")
        except DataError as error:
            self.missing = str(error)

    def read(self, name: str) -> Tensor:
        """uint8 `[3, H, W]` of a training image. Raises DataError where it is not there."""
        if self.missing is not None:
            raise DataError(self.missing)
        if self._data not in BUILTIN:
            return decoded(os.path.join(self._root, name), 3)  # noqa: PTH118 - a Path would normalise it
        if self._listing is None:
            raise DataError(f"{self._data} is not on this machine.")
        if name in self._rows:
            images, row = self._rows[name]
            return images.read(row)
        files = self._listing.parts["train"].images
        if isinstance(files, ArrayList):
            raise DataError(f"{self._data} has no image {name}.")
        return decoded(os.path.join(files.root, name), 3)  # noqa: PTH118

    @cached_property
    def _root(self) -> str:
        """Names are relative to a folder, or to the folder of a table."""
        return self._data if os.path.isdir(self._data) else os.path.dirname(self._data)  # noqa: PTH112, PTH120

    @cached_property
    def _listing(self) -> Listing | None:
        """Of a built-in data set; None where it would have to be downloaded."""
        with suppress(DataError):
            return list_builtin(self._data, download=False)
        return None

    @cached_property
    def _rows(self) -> dict[str, tuple[Arrays, int]]:
        """Image and row of each name, where the images of a built-in data set are arrays."""
        listed = [part.images for part in self._listing.parts.values()] if self._listing else []
        arrays = [
            Arrays(images.array, images.prefix, 3, images.numbers)
            for images in listed
            if isinstance(images, ArrayList)
        ]
        return {each.name(row): (each, row) for each in arrays for row in range(len(each))}
