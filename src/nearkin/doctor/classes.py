"""Findings about classes, splits and folders, for which no image is opened."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from nearkin.data.classes import class_remarks
from nearkin.data.dataset import one_class
from nearkin.data.sources.folders import HIDDEN, Harmless, find_images
from nearkin.data.sources.listing import Listing
from nearkin.doctor.findings import Finding
from nearkin.doctor.inventory import Inventory
from nearkin.errors import DataError, counted, listed

# Letters of other alphabets that look like Latin ones.
LOOK_ALIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0455\u0458\u03bf\u03b1\u03c1\u03bd\u0131",
    "aeopcyxisjoapvi",
)


def class_findings(inventory: Inventory) -> Iterator[Finding]:
    """Counts, then what is wrong with classes and splits."""
    if len(inventory.splits["train"].labels) == 0:
        yield Finding("error", "one-class", "no training image is left; training needs two classes")
        return
    yield _counts(inventory)
    trained = set(inventory.splits["train"].present())
    if len(trained) < 2:
        text = f"the data {one_class(inventory.splits['train'])}"
        yield Finding("error", "one-class", text)
    for name, part in inventory.splits.items():
        unknown = [known for known in part.present() if known not in trained]
        if unknown:
            rows = np.flatnonzero(
                np.isin(part.labels, [part.classes.index(known) for known in unknown])
            )
            text = (
                f"the split {name} has {counted(len(unknown), 'class', 'classes')} that train has not: "
                f"{listed(unknown)}; add training images, or remove them"
            )
            files = inventory.concerned(rows + inventory.starts[inventory.names.index(name)])
            yield Finding("error", "unknown-class", text, files)
    for remark in class_remarks(inventory.splits, inventory.classes):
        places = [inventory.classes.index(name) for name in remark.classes]
        rows = np.flatnonzero(np.isin(inventory.splits["train"].labels, places))
        text = f"{remark.text}{remark.advice}"
        yield Finding("warning", remark.code, text, inventory.concerned(rows))
    for names in look_alikes(inventory.classes):
        text = f"class names that look alike: {listed(names)}; if they mean the same, put their images into one"
        yield Finding("warning", "look-alike-names", text)


def _counts(inventory: Inventory) -> Finding:
    train = inventory.splits["train"]
    counts = np.bincount(train.labels, minlength=len(inventory.classes))
    counts = counts[counts > 0]
    each = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in inventory.splits.items())
    text = (
        f"{counted(len(inventory.classes), 'class', 'classes')}; {sizes} images; "
        f"{each} training images in a class"
    )
    return Finding("ok", "classes", text)


def look_alikes(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that differ in separators, a plural s or letters of another alphabet, but not in these alone that
    `class_remarks` reports: case, spaces around and Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_skeleton(name), []).append(name)
    return [
        group
        for group in groups.values()
        if len({unicodedata.normalize("NFC", name.strip()).casefold() for name in group}) > 1
    ]


def _skeleton(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold().translate(LOOK_ALIKE)
    letters = "".join(c for c in folded if c.isalnum()) or folded
    return (
        letters[:-1] if len(letters) > 3 and letters[-1] == "s" and letters[-2] != "s" else letters
    )


def folder_findings(listing: Listing) -> Iterator[Finding]:
    """What the listing left out."""
    for note in listing.notes:
        yield Finding("ok" if isinstance(note, Harmless) else "warning", "left-out", str(note))
    if os.path.isdir(listing.data):  # noqa: PTH112
        hidden = list(_hidden_with_images(listing.data))
        if hidden:
            number = counted(len(hidden), "hidden folder holds", "hidden folders hold")
            text = f"{number} images, which are ignored: {listed(hidden)}; rename what is a class, and delete the rest"
            yield Finding("warning", "hidden-folder", text)


def _hidden_with_images(root: str) -> Iterator[str]:
    for folder, names, _ in os.walk(root):
        for name in sorted(names):
            if name.startswith(".") or name in HIDDEN:
                path = os.path.join(folder, name)  # noqa: PTH118
                try:
                    find_images(path)
                except DataError:
                    continue
                yield os.path.relpath(path, root)
        names[:] = [name for name in names if not (name.startswith(".") or name in HIDDEN)]
