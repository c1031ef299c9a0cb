"""The checkpoint store: it survives a crash, a full disk, a power cut and a flipped bit.

A checkpoint is written into a temporary folder beside its final place, synced, read back, renamed
and synced again; only then are older ones removed. The newest is the one with the highest step
whose manifest verifies.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from nearkin.errors import ModelError, printable
from nearkin.files import SaveFailed, reporting, sync_folder
from nearkin.training.checkpoint.snapshot import Damaged, Snapshot, best_of, read, verify, write

__all__ = ["Damaged", "Kind", "SaveFailed", "Snapshot", "Store"]

Kind = Literal["step", "best"]
T = TypeVar("T")


class Store:
    """The checkpoints of one run, written by one process.

    folder: created by the first save. keep: how many of the newest whole `step` checkpoints stay,
    at least 1. A `best` checkpoint stays while a kept `step` checkpoint refers to it by
    `state["best"]["step"]`; the newest `best` always stays. Save the `best` before the `step` that
    refers to it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self.keep = keep
        self._verified: set[Path] = (
            set()
        )  # hashed once by this process; saves reading them at each save

    def path(self, kind: Kind, step: int) -> Path:
        """Where the checkpoint of `step` lies, whether or not it exists."""
        return self.folder / f"{kind}-{step:010d}"

    def paths(self, kind: Kind) -> list[Path]:
        """The checkpoints of one kind, whole or not, highest step first."""
        if not self.folder.is_dir():
            return []
        found = (
            path for path in self.folder.iterdir() if re.fullmatch(rf"{kind}-\d{{10,}}", path.name)
        )
        return sorted(found, key=_step, reverse=True)

    def save(self, snapshot: Snapshot, kind: Kind = "step") -> Path:
        """Publish `snapshot`, then remove what is too old; returns the checkpoint's folder.

        A whole checkpoint of the same kind and step is kept as it is; a damaged one is replaced.
        Raises `DivergedError` when a number is not finite, and `SaveFailed` when the disk refuses;
        either way the earlier checkpoints are untouched.
        """
        final = self.path(kind, snapshot.step)
        with reporting(f"Checkpoint {printable(str(final))} could not be saved"):
            self._prepare()
            if not _is_whole(final):
                self._publish(snapshot, final)
            sync_folder(self.folder)
            self._verified.add(final)
        with reporting(
            f"{printable(final.name)} is saved, but older checkpoints could not be removed"
        ):
            self._retire()
            self._clear()
        return final

    def newest(self, warn: Callable[[str], None]) -> Path | None:
        """The `step` checkpoint with the highest step whose manifest verifies, or None without any.

        Each damaged one that is skipped is named to `warn`, with the one used instead. Modification
        times play no part. Raises `ModelError` when there are checkpoints and all are damaged.
        """
        found = self._newest(verify, warn)
        return found[0] if found else None

    def load(self, path: Path) -> Snapshot:
        """The checkpoint in the folder `path`, of this store or any other; every byte is verified.

        Raises `ModelError` when it is damaged (`Damaged`) or of a format newer than this version
        reads.
        """
        return read(path)

    def load_newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The snapshot that `newest` would choose, or None; warns and raises as both do."""
        found = self._newest(self.load, warn)
        return found[1] if found else None

    def cut_back(self, step: int) -> None:
        """Forget best weights from after `step`: a resumed run finds them again, or finds others."""
        with reporting("Best weights from after the checkpoint could not be removed"):
            self._rename([path for path in self.paths("best") if _step(path) > step])
            self._clear()

    def _newest(
        self, examine: Callable[[Path], T], warn: Callable[[str], None]
    ) -> tuple[Path, T] | None:
        damaged: list[Damaged] = []
        for path in self.paths("step"):
            try:
                found = examine(path)
            except Damaged as error:
                damaged.append(error)
                continue
            for skipped in damaged:
                name, reason = printable(str(skipped.folder)), printable(skipped.reason)
                warn(f"Checkpoint {name} is damaged ({reason}); {path.name} is used instead.")
            return path, found
        if damaged:
            raise ModelError(
                f"All {len(damaged)} checkpoints in {printable(str(self.folder))} are damaged "
                f"(the newest: {printable(damaged[0].reason)}); start a new run."
            )
        return None

    def _prepare(self) -> None:
        """Make the folder, and remove what a killed process left in it."""
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        self._clear()

    def _clear(self) -> None:
        for temporary in self.folder.glob(".tmp-*"):
            shutil.rmtree(temporary)

    def _publish(self, snapshot: Snapshot, final: Path) -> None:
        temporary = self._temporary(final)
        temporary.mkdir()
        try:
            write(temporary, snapshot)
            verify(temporary)
            if final.exists():  # damaged, or save would have kept it
                final.rename(self.folder / f".tmp-damaged-{final.name}")
            temporary.rename(final)
        except Damaged as error:
            raise OSError(f"read back, {error.reason}") from error
        finally:  # after success it is gone; what a broken disk keeps, the next save removes
            shutil.rmtree(temporary, ignore_errors=True)

    def _retire(self) -> None:
        """Take the final names from what is too old, so that a kill leaves no half checkpoint."""
        steps = self.paths("step")
        newest = list(islice(filter(self._verifies, steps), self.keep))
        if len(newest) == self.keep:
            oldest = steps.index(newest[-1])
            self._rename(steps[oldest + 1 :])
            steps = steps[: oldest + 1]
        try:
            wanted = {best_of(path) for path in steps}
        except Damaged:
            return  # what a damaged checkpoint refers to is unknown: every best stays
        self._rename([path for path in self.paths("best")[1:] if _step(path) not in wanted])

    def _verifies(self, path: Path) -> bool:
        if path not in self._verified and _is_whole(path):
            self._verified.add(path)
        return path in self._verified

    def _rename(self, paths: list[Path]) -> None:
        for path in paths:
            path.rename(self._temporary(path))

    def _temporary(self, final: Path) -> Path:
        return self.folder / f".tmp-{final.name}"


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except Damaged:
        return False
    return True
