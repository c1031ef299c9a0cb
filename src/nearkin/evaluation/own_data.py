"""Whether DATA are the images that a run was trained on, wherever they are now. Imports neither torch nor NumPy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nearkin.errors import DataError, printable
from nearkin.evaluation.options import IDENTITY

if TYPE_CHECKING:
    from nearkin.config import RunConfig
    from nearkin.data.images import ImageSource
    from nearkin.data.sources.listing import Listing
    from nearkin.settings import Settings


# Advice of `explaining_place`.
PLACE = "do it there, or give DATA to nearkin evaluate, --data DATA to nearkin report"


class Origin(NamedTuple):
    """names: digest of the names and classes of the training images as they were listed, in order. sizes: that with
    the sizes of the files. place: `place_of` DATA. splits: the names of those that DATA had, joined by spaces."""

    names: str
    sizes: str
    place: str
    splits: str = ""

    def record(self) -> dict[str, str]:
        """As identity.json has it."""
        return {
            "origin": self.names,
            "origin_sizes": self.sizes,
            "place": self.place,
            "splits": self.splits,
        }


@contextmanager
def explaining_place(data: str, advice: str) -> Iterator[None]:
    """In the block `data`, as a run stores them, are looked for; where they are missing, the error says from where a
    relative path counts, and `advice`."""
    try:
        yield
    except DataError as error:
        from nearkin.data.sources.builtin import BUILTIN

        if data in BUILTIN or os.path.isabs(data) or os.path.exists(data):  # noqa: PTH117, PTH110 - any bytes may come
            raise
        raise DataError(
            f"{error} The run stores this path relative to the folder that it was started in, and this is "
            f"{printable(os.getcwd())}; {advice}."  # noqa: PTH109
        ) from None


def own_listing(data: str, origin: Origin | None, advice: str = PLACE) -> Listing:
    """The images that a run was trained on, in the place `data` that it stores. Raises DataError where they are
    missing, and as `check_place`."""
    from nearkin.data.sources.resolve import resolve

    with explaining_place(data, advice):
        listing = resolve(data)
    check_place(listing, data, origin, advice)
    return listing


def check_place(listing: Listing, data: str, origin: Origin | None, advice: str) -> None:
    """Raises DataError with `advice` where the path `data` that a run stores leads to another place than that of its
    training, with other images than those of `origin`."""
    if origin is None or is_own(listing, data, origin):
        return
    found = f"{printable(data)} is another place than that of the training, with other images"
    if os.path.isabs(data):  # noqa: PTH117 - any bytes may come
        raise DataError(f"{found}; put those of the training back.")
    raise DataError(
        f"{found}: the run stores this path relative to the folder that it was started in, and this is "
        f"{printable(os.getcwd())}; {advice}."  # noqa: PTH109
    )


def described(listing: Listing) -> dict[str, str]:
    """What identity.json says of DATA."""
    from nearkin.data.dataset import names_of, sizes_of

    names, sizes, place = names_of(listing), sizes_of(listing), place_of(listing.data)
    return Origin(names, sizes, place, " ".join(listing.parts)).record()


def place_of(data: str) -> str:
    """A digest of the absolute path, which may name a person; of a built-in data set its name."""
    from nearkin.data.sources.builtin import BUILTIN

    if data in BUILTIN:
        return data
    return hashlib.sha256(os.fsencode(os.path.realpath(data))).hexdigest()


def stored_origin(run: Path) -> Origin | None:
    """Of the data that the run was trained on; None where that is not known."""
    try:
        found = json.loads((run / IDENTITY).read_text(encoding="utf-8"))
        names, sizes, place = (str(found[name]) for name in ("origin", "origin_sizes", "place"))
        return Origin(names, sizes, place, str(found.get("splits", "")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def is_own(data: Listing, trained: str, origin: Origin | None) -> bool:
    """trained: the DATA of the run. Either it is the same place, or the training images have the same names, sizes and
    classes. A built-in name is not a folder of that name."""
    from nearkin.data.sources.builtin import BUILTIN

    if data.data in BUILTIN or trained in BUILTIN:
        return data.data == trained
    if place_of(data.data) == (place_of(trained) if origin is None else origin.place):
        return True
    if origin is None or "train" not in data.parts:
        return False
    from nearkin.data.dataset import names_of, sizes_of

    return names_of(data) == origin.names and sizes_of(data) == origin.sizes


def split_options(config: RunConfig | Settings, origin: Origin | None) -> dict[str, Any]:
    """The options of a run that give its very splits again (see `load_dataset` and `load_for_evaluation`). Where it had
    a val split of its own, nothing is held out of the training images, also when that split is missing now."""
    chosen = {"val_split", "split_seed", "seed", "images_per_class"}
    options: dict[str, Any] = config.model_dump(include=chosen)
    if origin is not None and "val" in origin.splits.split():
        options["val_split"] = 0.0
    return options


def trained_on(images: ImageSource, config: RunConfig, origin: Origin | None) -> list[str] | None:
    """The names of those image files that a run of this configuration was trained on, under any path; None where the
    run's data cannot be read any more, or are others now."""
    from nearkin.data.dataset import load_dataset
    from nearkin.data.sources.builtin import BUILTIN

    given = _inodes(images)
    if not given or config.data in BUILTIN:
        return []
    try:  # without a check: of an unreadable file only the name is compared
        listing = own_listing(config.data, origin)
        trained = load_dataset(
            listing, check=None, channels=config.channels, **split_options(config, origin)
        ).splits["train"]
    except DataError:
        return None
    return [given[node] for node in _inodes(trained.images) if node in given]


def _inodes(images: ImageSource) -> dict[tuple[int, int], str]:
    """Device and inode of each file, which are the same under any path, with its name."""
    from nearkin.data.images import Files

    found: dict[tuple[int, int], str] = {}
    if not isinstance(images, Files):
        return found
    for path, status in images.statuses():
        if status is not None:
            found[status.st_dev, status.st_ino] = os.fsdecode(path)
    return found
