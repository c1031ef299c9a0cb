"""The checkpoint store: it survives a crash, a full disk, a power cut and a flipped bit.

A checkpoint is written to a temporary folder beside its final place, synced, read back, renamed and synced again; only
then are older ones removed. The newest is the one with the highest step whose manifest verifies.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from nearkin.errors import ModelError, printable
from nearkin.files import own_folder, reporting, sync_folder
from nearkin.training.checkpoint.snapshot import Damaged, Snapshot, best_of, read, verify, write

Kind = Literal["step", "best", "probe"]
KEEP = 2  # newest whole `step` checkpoints that stay


class Store:
    """The checkpoints of one run, written by one process.

    folder: created by the first save. The newest two whole `step` checkpoints stay. A `best` checkpoint stays while a
    kept `step` checkpoint refers to it by `state["best"]["step"]`; the newest `best` always stays, and so does the
    `probe`. Save the `best` before the `step` that refers to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Hashed once by this process, instead of at each save.
        self._verified: set[Path] = set()

    def path(self, kind: Kind, step: int) -> Path:
        """Where the checkpoint of `step` lies, whether or not it exists."""
        return self.folder / f"{kind}-{step:010d}"

    def paths(self, kind: Kind) -> list[Path]:
        """The checkpoints of one kind, whole or not, highest step first."""
        if not self.folder.is_dir():
            return []
        name = re.compile(rf"{kind}-\d{{10,}}")
        found = (path for path in self.folder.iterdir() if name.fullmatch(path.name))
        return sorted(found, key=_step, reverse=True)

    def save(self, snapshot: Snapshot, kind: Kind = "step") -> Path:
        """Publish `snapshot`, then remove what is too old; returns the checkpoint's folder.

        A whole checkpoint of the same kind and step is kept as it is; a damaged one is replaced.
        Raises `DivergedError` when a number is not finite, and `SaveFailed` when the disk refuses;
        either way the earlier checkpoints are untouched.
        """
        final = self.path(kind, snapshot.step)
        with reporting(f"Checkpoint {printable(str(final))} could not be saved"):
            new = not self.folder.exists()
            own_folder(self.folder)  # where the run folder was removed, nothing is made anew
            if new:
                sync_folder(self.folder.parent)
            self._clear()
            if not _is_whole(final):
                self._publish(snapshot, final)
            sync_folder(self.folder)
            self._verified.add(final)
        saved = f"{printable(final.name)} is saved"
        with reporting(f"{saved}, but older checkpoints could not be removed"):
            self._retire()
            self._clear()
        return final

    def load_newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The snapshot with the highest step among the whole ones, or None without any checkpoint.

        Each damaged one that is skipped is named to `warn`, with the one used instead. Modification times are ignored.
        Raises `ModelError` when there are checkpoints and all are damaged, or the format is newer than this version.
        """
        damaged: list[Damaged] = []
        for path in self.paths("step"):
            try:
                snapshot = read(path)
            except Damaged as error:
                damaged.append(error)
                continue
            for skipped in damaged:
                name, reason = printable(str(skipped.folder)), printable(skipped.reason)
                warn(f"Checkpoint {name} is damaged ({reason}); {path.name} is used instead.")
            return snapshot
        if damaged:
            raise ModelError(
                f"All {len(damaged)} checkpoints in {printable(str(self.folder))} are damaged "
                f"(the newest: {printable(damaged[0].reason)}); start a new run."
            )
        return None

    def load(self, step: int) -> Snapshot:
        """The snapshot of `step`, with which the first process goes on. Raises `ModelError`."""
        path = self.path("step", step)
        try:
            return read(path)
        except Damaged as error:
            raise ModelError(
                f"The first process continues at checkpoint {printable(str(path))}, which another process cannot read "
                f"({printable(error.reason)}); give all processes the same run folder, or continue once more."
            ) from error

    def cut_back(self, step: int) -> None:
        """Remove best weights from after `step`, which a resumed run computes again."""
        if not self.folder.exists():
            return
        with reporting("Best weights from after the checkpoint could not be removed"):
            own_folder(self.folder)
            self._rename([path for path in self.paths("best") if _step(path) > step])
            self._clear()

    def _clear(self) -> None:
        """Remove what a save, or a killed process, left behind."""
        name = re.compile(rf"\.tmp-(damaged-)?({'|'.join(get_args(Kind))})-\d{{10,}}")
        for path in self.folder.iterdir():
            if name.fullmatch(path.name):
                shutil.rmtree(path)

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
        """Rename checkpoints that are too old before their removal, so that a kill leaves no incomplete one."""
        steps = self.paths("step")
        newest = list(islice(filter(self._verifies, steps), KEEP))
        if len(newest) == KEEP:
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
