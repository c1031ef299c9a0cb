"""Folders of images: the one walk that all verbs use, and its reading as splits and classes."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nearkin.data.sources.listing import (
    SPLIT_NAMES,
    FileList,
    ListedSplit,
    Listing,
    by_bytes,
    split_word,
    split_words,
)
from nearkin.errors import DataError, counted, listed, printable, to_install

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .avif".split()  # noqa: SIM905 - shorter
)
HEIF_SUFFIXES = frozenset((".heic", ".heif"))  # read where pillow-heif is installed
# Left behind by systems, as are names that begin with a dot.
HIDDEN = frozenset({"__MACOSX", "@eaDir", "lost+found"})
Identity = tuple[int, int]  # device and inode of a folder


def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of the files that are taken for images."""
    return IMAGE_SUFFIXES | (HEIF_SUFFIXES if find_spec("pillow_heif") else frozenset())


class Harmless(str):
    """A note about what is left out of most folders: hidden files, and files that are no images."""

    __slots__ = ()


class Found(NamedTuple):
    """Images below a folder, sorted by the bytes of their paths. notes: what was left out."""

    files: FileList
    notes: tuple[str, ...]


def find_images(root: str) -> Found:
    """All images at any depth below `root`.

    Symbolic links are followed, also out of `root`; a link to a folder above itself, a second way to
    a folder and a broken link are left out.
    Hidden names (a leading dot, `__MACOSX`, `@eaDir`, `lost+found`) and files of other kinds are left out.

    Raises DataError when there is no image, saying what there is, or a folder cannot be read.
    """
    walk = _Walk(root)
    paths = walk.images("")
    if not paths:
        raise DataError(f"The folder {printable(root)} holds no images{walk.instead()}.")
    return Found(FileList.pack(root, paths), walk.notes())


def list_folder(root: str) -> Listing:
    """All images under `root`, sorted by the bytes of their paths.

    Layout: `CLASS/**/image`, or `SPLIT/CLASS/**/image` where SPLIT is train, val or test (or another usual name, see
    `split_words`). The folders are splits when all are named so, or when there is a train folder that holds no image
    itself. What is left out, as by `find_images`, and files beside the class folders are noted.

    Raises DataError when there is no image in class folders, a folder cannot be read, two folders name one split, or
    folders that look like splits have other names.
    """
    walk = _Walk(root)
    top = walk.folders("")
    splits = _splits(walk, top)
    parts = {
        split: part for split, folder in splits.items() if (part := walk.part(folder)) is not None
    }
    if splits != {"train": ""}:
        shown = {Path(folder).parts[0] for folder in splits.values()}
        extra = [name for name in top if name not in shown]
        walk.note(
            extra, "folder beside the splits is ignored", "folders beside the splits are ignored"
        )
        empty = [folder for split, folder in splits.items() if split not in parts]
        flat = [folder for folder in empty if walk.holds_images(folder)]
        walk.note(
            flat,
            "split has images but no class folders, and is ignored; predict takes them",
            "splits have images but no class folders, and are ignored; predict takes them",
        )
        empty = [folder for folder in empty if folder not in flat]
        walk.note(empty, "split without images is ignored", "splits without images are ignored")
    if not parts:
        raise DataError(
            f"The folder {printable(root)} holds no images in class folders{walk.instead()}; "
            "lay it out as CLASS/image.jpg or train/CLASS/image.jpg."
        )
    return Listing(os.path.basename(os.path.abspath(root)), parts, walk.notes())  # noqa: PTH100, PTH119


def _splits(walk: _Walk, top: list[str]) -> dict[str, str]:
    """Split -> folder, or the root itself as train where there are no splits."""
    named = split_words(top)
    train = [name for name, split in named.items() if split == "train"]
    if not named or (len(named) < len(top) and not (train and not walk.holds_images(train[0]))):
        return {"train": ""}
    splits: dict[str, str] = {}
    for name, split in named.items():
        if split in splits:
            raise DataError(_twice(walk, split, splits[split], name))
        splits[split] = name
    for name in top:
        meant = None if name in named else split_word(name)
        # Beside `train` itself `train_small` is a folder like others, beside `train_2020` it is not.
        if meant not in splits or splits[meant].lower() in SPLIT_NAMES:
            continue
        if set(walk.folders(name)) & set(walk.folders(splits[meant])):
            raise DataError(_twice(walk, meant, splits[meant], name))
    for split, name in splits.items():
        if walk.folders(name) == [name] and not walk.holds_images(name):
            # An archive was unpacked into a folder of its own name.
            splits[split] = os.path.join(name, name)  # noqa: PTH118
    return splits


def _twice(walk: _Walk, split: str, *names: str) -> str:
    first, second = map(printable, names)
    return f"{printable(walk.root)} has two folders for the split {split}, {first} and {second}; keep one."


class _Walk:
    """Reads folders and counts what it leaves out. Paths are relative to the root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._suffixes = image_suffixes()
        self._hidden = self._loops = self._again = self._beside = self._images_beside = 0
        self._others: Counter[str] = Counter()  # files of other kinds, by suffix
        self._broken: list[str] = []
        self._remarks: list[str] = []

    def part(self, folder: str) -> ListedSplit | None:
        """The classes of one split, or None without any image. Raises DataError for splits with unknown names."""
        names = self.folders(folder, count=True)
        self._refuse_unknown_splits(folder, names)
        found = {name: self.images(os.path.join(folder, name)) for name in names}  # noqa: PTH118
        where = f" in {printable(folder)}" if folder else ""
        self.note(
            [name for name, paths in found.items() if not paths],
            f"folder{where} without images is no class",
            f"folders{where} without images are no classes",
        )
        classes = tuple(name for name, paths in found.items() if paths)
        if not classes:
            return None
        labels = np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes])
        # Each class is freed when it is packed: as Python objects the paths take three times the memory.
        paths = (path for name in names for path in found.pop(name))
        return ListedSplit(FileList.pack(self.root, paths), labels, classes)

    def folders(self, folder: str, *, count: bool = False) -> list[str]:
        """The visible folders inside `folder`, sorted; with `count`, all else is counted as left out."""
        names = []
        for entry in self._entries(folder):
            kind = self._kind(entry)
            if kind == "folder":
                names.append(entry.name)
            elif count and kind in ("image", "other"):
                self._beside += 1
                self._images_beside += kind == "image"
            elif count:
                self._leave_out(entry, kind)
        return by_bytes(names)

    def holds_images(self, folder: str) -> bool:
        return any(self._kind(entry) == "image" for entry in self._entries(folder))

    def images(self, folder: str) -> list[bytes]:
        """Paths of all images below `folder`, sorted by their bytes. Each folder is read once, links last."""
        found: list[bytes] = []
        above_it = [str(path) for path in Path(folder, "x").parents[1:]] if folder else []
        waiting = [(folder, frozenset(map(self._identity, above_it)))]
        links: deque[tuple[str, frozenset[Identity]]] = deque()
        seen: set[Identity] = set()
        while waiting or links:
            here, above = waiting.pop() if waiting else links.popleft()
            identity = self._identity(here)
            if identity in above or identity in seen:
                self._loops += identity in above
                self._again += identity not in above
                continue
            seen.add(identity)
            prefix = os.path.join(os.fsencode(here), b"")  # noqa: PTH118 - ends in a separator, or is empty
            inside = []
            for entry in self._entries(here):
                kind = self._kind(entry)
                if kind == "image":
                    found.append(prefix + os.fsencode(entry.name))
                elif kind == "folder":
                    inside.append(entry)
                else:
                    self._leave_out(entry, kind)
            for entry in sorted(inside, key=lambda entry: os.fsencode(entry.name)):
                later = links if entry.is_symlink() else waiting
                later.append((os.path.join(here, entry.name), above | {identity}))  # noqa: PTH118
        found.sort()
        return found

    def note(self, names: list[str], one: str, many: str) -> None:
        """Remember a remark about `names`, if there are any."""
        if names:
            text = one if len(names) == 1 else many
            self._remarks.append(f"{len(names)} {text}: {listed(names)}")

    def notes(self) -> tuple[str, ...]:
        """All remarks, then what was left out."""
        found = list(self._remarks)
        if self._hidden:
            words = "hidden file or folder is ignored", "hidden files or folders are ignored"
            found.append(Harmless(counted(self._hidden, *words)))
        if self._beside:
            words = (
                "file beside the class folders is ignored",
                "files beside the class folders are ignored",
            )
            kind = str if self._images_beside else Harmless
            found.append(kind(counted(self._beside, *words)))
        return (*found, *(type(what)(f"ignored: {what}") for what in self._left_out()))

    def instead(self) -> str:
        """`, only 12 .heic files (...) and 2 broken links`, or nothing where the folder is empty."""
        found = list(self._left_out())
        if self._images_beside:
            found.insert(0, f"{counted(self._images_beside, 'image')} outside class folders")
        if self._hidden:
            found.append(counted(self._hidden, "hidden file or folder", "hidden files or folders"))
        return f", only {' and '.join(found)}" if found else ""

    def _left_out(self) -> Iterator[str]:
        heif = sum(self._others[suffix] for suffix in HEIF_SUFFIXES)
        kinds = [
            counted(n, f"{suffix} file" if suffix else "file without a suffix", f"{suffix} files")
            for suffix, n in self._others.most_common()
        ]
        if kinds:
            help_ = f" (to read .heic, {to_install('heic')})" if heif else ""
            yield f"{listed(kinds)}{help_}" if heif else Harmless(listed(kinds))
        if self._broken:
            yield f"{counted(len(self._broken), 'broken link')} ({listed(self._broken)})"
        if self._loops:
            yield counted(self._loops, "link to a folder above it", "links to folders above them")
        if self._again:
            words = (
                "link to a folder that is read already",
                "links to folders that are read already",
            )
            yield counted(self._again, *words)

    def _refuse_unknown_splits(self, folder: str, names: list[str]) -> None:
        """Raises DataError where all of several folders hold the same two folders or more and no image."""
        if len(names) < 2:
            return
        common: set[str] | None = None
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118
            inside = set(self.folders(path))
            common = inside if common is None else common & inside
            if len(common) < 2 or self.holds_images(path):
                return
        where = os.path.join(self.root, folder) if folder else self.root  # noqa: PTH118
        raise DataError(
            f"The folders {listed(names)} in {printable(where)} all hold folders of the same names "
            f"({listed(by_bytes(common or ()))}), as splits do. If they are splits, call them train, val and test; "
            "if they are classes, put their images into one folder each or give a table of path,label."
        )

    def _leave_out(self, entry: os.DirEntry[str], kind: str) -> None:
        if kind == "broken":
            self._broken.append(os.path.relpath(entry.path, self.root))
        elif kind == "hidden":
            self._hidden += 1
        else:
            self._others[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122

    def _identity(self, folder: str) -> Identity:
        path = self._path(folder)
        try:
            status = os.stat(path)  # noqa: PTH116 - a Path would normalise it
        except OSError as error:
            raise _unreadable(path, error) from error
        return status.st_dev, status.st_ino

    def _path(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root  # noqa: PTH118

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        path = self._path(folder)
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _kind(self, entry: os.DirEntry[str]) -> str:
        """`folder`, `image`, or why the entry is left out. A pipe named x.jpg is an image; the look refuses it."""
        if entry.name.startswith(".") or entry.name in HIDDEN:
            return "hidden"
        try:
            if entry.is_dir():
                return "folder"
        except OSError:  # a link that leads to itself
            return "broken"
        if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
            return "broken"
        suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - ".jpg" has none
        return "image" if suffix in self._suffixes else "other"


def _unreadable(path: str, error: OSError) -> DataError:
    reason = (error.strerror or str(error)).lower()
    return DataError(f"The folder {printable(path)} cannot be read: {reason}.")
