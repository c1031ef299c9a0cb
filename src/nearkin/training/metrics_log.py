"""The records of a run: running means on the device, metrics.jsonl, status.json and train.log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from nearkin.errors import ModelError, printable
from nearkin.files import SaveFailed, write_atomic
from nearkin.training.run_folder import STATUS
from nearkin.types import Loss

WINDOWS = ("interval", "epoch")


class Meters:
    """The loss, its terms and its counts since the last `take` and since the last `take_epoch`.

    Saved in checkpoints, so that a resumed run reports the same means as one that was not interrupted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {window: torch.zeros(0) for window in WINDOWS}
        self._steps = dict.fromkeys(WINDOWS, 0)
        self._names: list[str] = []
        self._counts: list[str] = []

    def add(self, loss: Loss) -> None:
        """Count one step."""
        named = {"loss": loss.total.detach(), **loss.terms, **loss.counts}
        self._names, self._counts = list(named), list(loss.counts)
        values = torch.stack([value.to(self._dtype) for value in named.values()])
        for window in WINDOWS:
            self._sums[window] = self._sums[window] + values if self._steps[window] else values
            self._steps[window] += 1

    def take(self) -> dict[str, float]:
        """The means of loss and terms over the interval."""
        means, _ = self._take("interval")
        return means

    def take_epoch(self) -> tuple[dict[str, float], dict[str, int]]:
        """The means of loss and terms, and the sums of the counts, over the epoch."""
        return self._take("epoch")

    def _take(self, window: str) -> tuple[dict[str, float], dict[str, int]]:
        steps, self._steps[window] = self._steps[window], 0
        if steps == 0:
            return {}, {}
        sums = dict(zip(self._names, self._sums[window].tolist(), strict=True))
        self._sums[window] = torch.zeros(0)  # a checkpoint must not hold what has been reported
        counts = {name: round(sums.pop(name)) for name in self._counts}
        return {name: value / steps for name, value in sums.items()}, counts

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, to be saved."""
        plain = {"names": self._names, "counts": self._counts, "steps": self._steps}
        return dict(self._sums), plain

    def load(self, sums: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore `state`."""
        self._sums = {window: total.to(self._device) for window, total in sums.items()}
        self._names, self._counts = state["names"], state["counts"]
        self._steps = dict(state["steps"])


METRICS = "metrics.jsonl"
LOG = "train.log"
HEARTBEAT = 10.0  # seconds


class Journal:
    """Three files in the run folder.

    `metrics.jsonl`: one JSON object per line with kind, stage, step, epoch and the values; everything that depends on
    the wall clock stands under `clock`, so that the rest is equal between equal runs. `status.json`: the current state
    of the run. `train.log`: text with times.

    Training never stops because one of them cannot be written: the first failure gives one warning on stderr, the rest
    are silent; `failures` counts them by file name. writes: False on all processes but the first. mirror: gets every
    record as well.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self.mirror: Callable[[Mapping[str, Any]], None] | None = None
        self.failures: Counter[str] = Counter()
        self._next_heartbeat = -math.inf
        self._replacing = Lock()  # another process's failure is recorded by a thread of its own

    def record(
        self,
        kind: str,
        *,
        stage: str,
        step: int,
        epoch: int,
        clock: Mapping[str, object] | None = None,
        **values: object,
    ) -> None:
        """Append one line to `metrics.jsonl`.

        kind: `train`, `validation`, ... step: optimiser steps done. values: numbers, texts, lists,
        mappings, or anything with `item()`; NaN and the infinities become the texts `nan`, `inf`
        and `-inf`. clock: durations and rates; the time of writing is added to them.
        """
        line = {"kind": kind, "stage": stage, "step": step, "epoch": epoch, **values}
        line["clock"] = {"time": _now(), **(clock or {})}
        self._append(METRICS, _json(line))
        if self.mirror is not None:
            self.mirror(line)

    def status(
        self,
        state: str,
        *,
        step: int,
        steps: int,
        epoch: int,
        best: object = None,
        message: str = "",
    ) -> None:
        """Replace `status.json`; the time and the process id are added. A reader sees the old file or the new one.

        state: `running` is written at most once in 10 s and is a heartbeat; any other state is always written. step,
        steps: optimiser steps done and planned. best: the best metric.
        """
        now = time.monotonic()
        if state == "running" and now < self._next_heartbeat:
            return
        self._next_heartbeat = now + HEARTBEAT
        fields = {"state": state, "step": step, "steps": steps, "epoch": epoch, "best": best}
        fields |= {"message": message, "updated": _now(), "pid": os.getpid()}
        data = _json(fields).encode() + b"\n"
        with self._replacing:
            self._attempt(STATUS, lambda: _replace(self.folder / STATUS, data))

    def log(self, text: str) -> None:
        """Append `text` to `train.log`, each line with the time and control characters escaped."""
        now = _now()
        self._append(LOG, "\n".join(f"{now} {printable(line)}" for line in text.split("\n")))

    def cut_back(self, step: int, *, validated: bool = True) -> None:
        """Remove the lines of `metrics.jsonl` after `step`, those of a new fit at the end, and an incomplete last line;
        unless `validated`, the validation of `step`, too.

        Resuming from a checkpoint of `step` then writes them again. Raises `ModelError` when
        another line is no JSON, and `SaveFailed` when the disk refuses.
        """
        path = self.folder / METRICS
        if path.exists():
            kept = [
                line + b"\n"
                for line, fields in _lines(path)
                if fields["step"] <= step
                and fields.get("kind") != "refit"
                and (validated or (fields.get("kind"), fields["step"]) != ("validation", step))
            ]
            write_atomic(path, b"".join(kept))

    def records(self) -> list[dict[str, Any]]:
        """The records so far. Raises `ModelError`."""
        path = self.folder / METRICS
        return read_metrics(path) if path.exists() else []

    def _append(self, name: str, text: str) -> None:
        self._attempt(name, lambda: _append(self.folder / name, text.encode() + b"\n"))

    def _attempt(self, name: str, write: Callable[[], None]) -> None:
        try:
            if self._writes:
                write()
        except (OSError, SaveFailed) as error:
            first = not self.failures
            self.failures[name] += 1
            if first:
                path = printable(str(self.folder / name))
                reason = error.__cause__ or error  # the OSError inside a SaveFailed
                text = f"{path} cannot be written ({printable(str(reason))}); training goes on."
                with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be gone
                    sys.stderr.write(f"warning: {text}\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without an incomplete last line. Raises `ModelError`."""
    return [fields for _, fields in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line of `path` with its object."""
    try:
        *whole, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ModelError(f"{printable(str(path))} cannot be read: {error.strerror}.") from error
    for number, line in enumerate([*whole, last], start=1):
        try:
            fields = json.loads(line)
            fields["step"] = int(fields["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            if number <= len(whole):
                raise ModelError(
                    f"{printable(str(path))} line {number} is no JSON object with a step; remove that line."
                ) from None
        else:
            yield line, fields


def _replace(path: Path, data: bytes) -> None:
    """Replace a file in one step, without waiting for the disk. Nothing is written to what stands under the temporary
    name, such as a link."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(data)
    temporary.replace(path)


def _append(path: Path, data: bytes) -> None:
    """Append `data` whole or not at all: a full disk may take the first half of a line. Never through a link, which
    someone else's run folder may hold."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _json(value: object) -> str:
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))


def _plain(value: object) -> object:
    """`value` in what JSON can hold."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
