"""One checkpoint on disk: safetensors, JSON, and a manifest with the SHA-256 of every file.

`manifest.json` holds the SHA-256 and the size of every other file and is written last: a folder without it is
incomplete. Its layout never changes. The format version is in `state.json`, which is verified first, so that a flipped
bit is not read as a newer format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from nearkin.errors import DivergedError, ModelError, printable
from nearkin.files import sync_folder, write_synced

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
MAX_MANIFEST = 2**20
MAX_STATE = 2**26


class Snapshot(NamedTuple):
    """The contents of a checkpoint.

    step: optimiser steps done. tensors: file stem -> name -> tensor; each stem is stored as `<stem>.safetensors`. They
    are read back on the CPU, each with memory of its own, in another order. state: JSON values; tuples are read back as
    lists, keys as strings. `state["best"]["step"]` is the step of the best weights of this snapshot.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Damaged(ModelError):
    """A checkpoint that is incomplete, altered or unreadable. `reason` says which file and how."""

    def __init__(self, folder: Path, reason: str) -> None:
        self.folder = folder
        self.reason = reason
        super().__init__(
            f"Checkpoint {printable(str(folder))} cannot be used ({printable(reason)}); "
            "take another checkpoint or start a new run."
        )


class Entry(BaseModel):
    """The manifest's entry of one file: `size` in bytes and its SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """The files of a checkpoint. The pattern of a name admits no path that leaves the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    files: dict[Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")], Entry]


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write `snapshot` to the empty `folder`, the manifest last, and sync it.

    Raises `DivergedError` when a floating tensor or a number of the state is not finite, and `OSError`.
    """
    entries: dict[str, Entry] = {}
    for name, data in _files(snapshot):
        write_synced(folder / name, data)
        entries[name] = Entry(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    write_synced(folder / MANIFEST, Manifest(files=entries).model_dump_json().encode())
    sync_folder(folder)


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises `Damaged` at the first that differs."""
    for name, entry in _manifest(folder).files.items():
        with _opened(folder / name, entry.size) as file:
            _compare(folder / name, hashlib.file_digest(file, "sha256").hexdigest(), entry)


def read(folder: Path) -> Snapshot:
    """The snapshot in `folder`. Every file is compared with the manifest before it is parsed.

    Raises `Damaged`, and `ModelError` when the format is newer than this version of nearkin reads.
    """
    files = dict(_manifest(folder).files)
    step, state = _parse_state(folder, _read(folder / STATE, files.pop(STATE)))
    tensors = {}
    for name, entry in files.items():
        if not name.endswith(SUFFIX):
            raise Damaged(folder, f"{name} is neither {STATE} nor a {SUFFIX} file")
        data = _read(folder / name, entry)
        try:
            tensors[name.removesuffix(SUFFIX)] = safetensors.load(data)
        except (SafetensorError, LookupError, ValueError) as error:
            raise Damaged(folder, f"{name} is no safetensors file: {error}") from error
    return Snapshot(step, tensors, state)


def best_of(folder: Path) -> int | None:
    """The step of the best weights of the snapshot. Raises as `read` does."""
    _, state = _parse_state(folder, _read(folder / STATE, _manifest(folder).files[STATE]))
    best = state.get("best")
    return best.get("step") if isinstance(best, dict) else None


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """The files one after another, so that only one is in memory."""
    document = {"format": FORMAT, "step": snapshot.step, "state": snapshot.state}
    try:
        state = json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise _diverged(snapshot.step, "its state") from error
    yield STATE, state.encode()
    for stem, tensors in snapshot.tensors.items():
        yield stem + SUFFIX, safetensors.save(_storable(snapshot.step, stem, tensors))


def _storable(step: int, stem: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, contiguous, no two sharing memory (which safetensors refuses)."""
    storages: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if not torch.isfinite(value).all():
            raise _diverged(step, f"{stem}/{name}")
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _diverged(step: int, place: str) -> DivergedError:
    return DivergedError(
        f"The checkpoint of step {step} was not written: {place} holds a number that is not "
        "finite; start a new run with a lower --lr, --clip-grad 1 or --precision fp32."
    )


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    with _opened(path) as file:
        text = file.read(MAX_MANIFEST + 1)
    try:
        manifest = Manifest.model_validate_json(text[:MAX_MANIFEST])
    except ValidationError as error:
        raise Damaged(folder, f"{MANIFEST} is not what nearkin writes") from error
    # Written again it must give the same bytes: of two equal names, JSON silently drops one.
    if manifest.model_dump_json().encode() != text or STATE not in manifest.files:
        raise Damaged(folder, f"{MANIFEST} is not what nearkin writes")
    return manifest


def _parse_state(folder: Path, data: bytes) -> tuple[int, dict[str, Any]]:
    try:
        document = json.loads(data)
        version = document["format"]
        if version > FORMAT:
            raise ModelError(
                f"Checkpoint {printable(str(folder))} has format {version}, this version of "
                f"nearkin reads formats up to {FORMAT}; update nearkin."
            )
        return int(document["step"]), dict(document["state"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damaged(folder, f"{STATE} is not what nearkin writes") from error


def _read(path: Path, entry: Entry) -> bytes:
    if path.name == STATE and entry.size > MAX_STATE:
        raise Damaged(path.parent, f"{STATE} has {entry.size} bytes, more than {MAX_STATE}")
    with _opened(path, entry.size) as file:
        data = file.read(entry.size)
    _compare(path, hashlib.sha256(data).hexdigest(), entry)
    return data


def _compare(path: Path, sha256: str, entry: Entry) -> None:
    if sha256 != entry.sha256:
        raise Damaged(path.parent, f"the SHA-256 of {path.name} differs from the manifest")


@contextlib.contextmanager
def _opened(path: Path, size: int | None = None) -> Iterator[BufferedReader]:
    """A plain file of `size` bytes, opened; links, pipes and devices are refused unopened."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(path.parent, f"{path.name} is not a plain file")
        if size is not None and status.st_size != size:
            raise Damaged(path.parent, f"{path.name} has {status.st_size} bytes instead of {size}")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise Damaged(path.parent, f"{path.name}: {error.strerror or error}") from error
