"""Tables of the images of a folder or table with other splits: a test split where there is none, or no validation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearkin.data.dataset import Dataset, stratified
from nearkin.data.sources.listing import FileList, ListedSplit, Listing
from nearkin.errors import DataError, printable
from nearkin.files import write_csv

Row = tuple[str, str, str]  # path, label, split
TEST_SHARE = 0.2  # of the training images of each class


def rows_with_test(listing: Listing) -> list[Row] | None:
    """The images with a fifth of the training images as a test split where the data have none: the same ones as long as
    the images are the same; None where they have one. Raises DataError where no image can be spared."""
    if "test" in listing.parts:
        return None
    train = listing.parts["train"]
    held = set(stratified(train.labels, TEST_SHARE, seed=0).tolist())
    if not held:
        raise DataError(
            f"No class of {printable(listing.data)} has two training images, so none can be held out to test; "
            "give more images, or a test split."
        )
    return [
        (path, label, "test" if split == "train" and place in held else split)
        for split, part in listing.parts.items()
        for place, (path, label) in enumerate(_images(part))
    ]


def other_images(table: Path, rows: Sequence[Row]) -> bool:
    """Whether `table` is there and has other rows."""
    try:
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [tuple(row) for row in csv.reader(file)][1:] != list(rows)
    except (OSError, csv.Error):
        return False


def write_table(table: Path, rows: Sequence[Row]) -> None:
    """Raises SaveFailed."""
    write_csv(table, ("path", "label", "split"), rows)


def with_validation_in_training(listing: Listing, table: Path) -> bool:
    """Write `table` with the validation images of the data among the training images. Returns whether it was written:
    not where there is no validation split of its own.

    Raises SaveFailed when the table cannot be written.
    """
    if "val" not in listing.parts:
        return False
    rows = [
        (path, label, "train" if split == "val" else split)
        for split, part in listing.parts.items()
        for path, label in _images(part)
    ]
    write_table(table, rows)
    return True


def with_limited_training(chosen: Dataset, table: Path) -> bool:
    """As above, for the images that a run with `images_per_class` chose: those it trained on, and those it validated
    with. Returns whether it was written: not for images that are no files."""
    if set(chosen.files) != set(chosen.splits):
        return False
    rows = [
        (
            str(Path(files.path(row)).absolute()),
            chosen.splits[split].classes[label],
            "train" if split == "val" else split,
        )
        for split, files in chosen.files.items()
        for row, label in enumerate(chosen.splits[split].labels)
    ]
    write_table(table, rows)
    return True


def _images(part: ListedSplit) -> Iterator[tuple[str, str]]:
    """Absolute path and class of each image; links, and `..` behind them, stay as they are. Raises DataError for images
    that are no files."""
    if not isinstance(part.images, FileList):
        raise DataError("Only image files can be divided anew; built-in data keep their splits.")
    for row, label in enumerate(part.labels):
        yield str(Path(part.images.path(row)).absolute()), part.classes[label]
