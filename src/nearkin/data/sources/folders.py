"""A folder of class folders, with or without a level of splits above them."""

from __future__ import annotations

import os
from collections import Counter

from nearkin.data.decode import IMAGE_SUFFIXES
from nearkin.data.images import Files
from nearkin.data.sources.listing import SPLIT_NAMES, ListedSplit, Listing, by_bytes, numbered
from nearkin.errors import DataError, counted, listed, printable

# Left behind by systems, as are names that begin with a dot.
NO_CLASSES = frozenset({"__MACOSX", "@eaDir", "lost+found"})
# What is left out and counted: one of it, several of it.
LEFT_OUT = {
    "hidden": ("hidden file or folder is ignored", "hidden files or folders are ignored"),
    "link": ("symbolic link is not followed", "symbolic links are not followed"),
    "other": ("file that is no image is ignored", "files that are no images are ignored"),
    "beside": (
        "file beside the class folders is ignored",
        "files beside the class folders are ignored",
    ),
}


def list_folder(root: str) -> Listing:
    """All images under `root`, sorted by the bytes of their paths.

    Layout: `CLASS/**/image`, or `SPLIT/CLASS/**/image` where SPLIT is train, val (or valid, validation) or
    test in any case. The folders are splits when all are named so, or when there is a train folder that
    holds no image itself. Ignored, and noted: hidden names, folders without images, files beside the class
    folders, files that are no images, symbolic links.

    Raises DataError when there is no image, a folder cannot be read, or two folders name one split.
    """
    walk = _Walk(root)
    top = walk.folders("")
    splits = _splits(walk, top)
    parts = {
        split: part for split, folder in splits.items() if (part := walk.part(folder)) is not None
    }
    if splits != {"train": ""}:
        extra = [name for name in top if name not in splits.values()]
        walk.note(
            extra, "folder beside the splits is ignored", "folders beside the splits are ignored"
        )
        empty = [folder for split, folder in splits.items() if split not in parts]
        walk.note(empty, "split without images is ignored", "splits without images are ignored")
    if not parts:
        raise DataError(
            f"The folder {printable(root)} holds no images in class folders; "
            "lay it out as CLASS/image.jpg or train/CLASS/image.jpg."
        )
    return Listing(os.path.basename(os.path.abspath(root)), parts, walk.notes())  # noqa: PTH100, PTH119


def _splits(walk: _Walk, top: list[str]) -> dict[str, str]:
    """Split -> folder, or the root itself as train where there are no splits."""
    named = [name for name in top if name.lower() in SPLIT_NAMES]
    train = [name for name in named if name.lower() == "train"]
    if not named or (len(named) < len(top) and not (train and not walk.holds_images(train[0]))):
        return {"train": ""}
    splits: dict[str, str] = {}
    for name in named:
        split = SPLIT_NAMES[name.lower()]
        if split in splits:
            raise DataError(
                f"{printable(walk.root)} has two folders for the split {split}, "
                f"{printable(splits[split])} and {printable(name)}; keep one."
            )
        splits[split] = name
    return splits


class _Walk:
    """Reads folders and keeps count of what it leaves out. Paths are relative to the root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._left_out: Counter[str] = Counter()
        self._remarks: list[str] = []

    def part(self, folder: str) -> ListedSplit | None:
        """The classes of one split, or None without any image."""
        paths: list[str] = []
        labels: list[str] = []
        empty: list[str] = []
        for name in self.folders(folder, count=True):
            found = self._images(os.path.join(folder, name))  # noqa: PTH118
            paths += found
            labels += [name] * len(found)
            if not found:
                empty.append(name)
        where = f" in {printable(folder)}" if folder else ""
        self.note(
            empty,
            f"folder{where} without images is no class",
            f"folders{where} without images are no classes",
        )
        if not paths:
            return None
        return ListedSplit(Files(self.root, paths), *numbered(labels))

    def folders(self, folder: str, *, count: bool = False) -> list[str]:
        """The visible folders inside `folder`, sorted; with `count`, all else is counted as left out."""
        names = []
        for entry in self._entries(folder):
            kind = self._kind(entry)
            if kind == "folder":
                names.append(entry.name)
            elif count:
                self._left_out["beside" if kind in ("image", "other") else kind] += 1
        return by_bytes(names)

    def holds_images(self, folder: str) -> bool:
        return any(self._kind(entry) == "image" for entry in self._entries(folder))

    def note(self, names: list[str], one: str, many: str) -> None:
        """Remember a remark about `names`, if there are any."""
        if names:
            text = one if len(names) == 1 else many
            self._remarks.append(f"{len(names)} {text}: {listed(names)}")

    def notes(self) -> tuple[str, ...]:
        """All remarks, then the counts of what was left out."""
        counts = [(self._left_out[kind], words) for kind, words in LEFT_OUT.items()]
        return (*self._remarks, *(counted(count, *words) for count, words in counts if count))

    def _images(self, folder: str) -> list[str]:
        """Paths of all images below `folder`, sorted."""
        waiting, found = [folder], []
        while waiting:
            here = waiting.pop()
            for entry in self._entries(here):
                path, kind = os.path.join(here, entry.name), self._kind(entry)  # noqa: PTH118
                if kind == "folder":
                    waiting.append(path)
                elif kind == "image":
                    found.append(path)
                else:
                    self._left_out[kind] += 1
        return by_bytes(found)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        path = os.path.join(self.root, folder)  # noqa: PTH118
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(f"The folder {printable(path)} cannot be read: {reason}.") from error

    @staticmethod
    def _kind(entry: os.DirEntry[str]) -> str:
        """`folder`, `image`, or why the entry is left out. A pipe named x.jpg is an image: the scan tells."""
        if entry.name.startswith(".") or entry.name in NO_CLASSES:
            return "hidden"
        if entry.is_symlink():
            return "link"
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - ".jpg" has none
        return "image" if suffix in IMAGE_SUFFIXES else "other"
