"""The manifest of a bundle: what the model takes and gives, and the checksum of each file. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nearkin.errors import ExportError, counted, listed, printable
from nearkin.files import sha256, write_atomic

Format = Literal["onnx", "timm", "torch"]
MANIFEST = "manifest.json"
CHECK = "check.safetensors"
MODELS: dict[Format, str] = {
    "onnx": "model.onnx",
    "timm": "model.safetensors",
    "torch": "model.pt2",
}
TIMM = "config.json"  # what timm builds the network from
VERSION = 1
LARGEST = 1 << 24  # bytes of a manifest that is read


class Checked(BaseModel):
    """What the model was compared on: images of a split, at each of these batch sizes.

    largest_difference: from nearkin's own output, in the unit of the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    images: int
    batch_sizes: tuple[int, ...]
    largest_difference: float


class Manifest(BaseModel):
    """`manifest.json`. input, output: dtype, shape and meaning. temperature: of the probabilities; where the output is
    logits, softmax(logits / temperature) gives them. files: SHA-256 of each file beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    nearkin: str
    kind: Format
    raw: bool
    input: str
    output: Literal["probabilities", "logits"]
    classes: tuple[str, ...] = Field(min_length=1)
    temperature: float = Field(gt=0)
    transform: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    packages: dict[str, str]
    checked: Checked
    files: dict[str, str]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the checksums of all files that are in `folder` now; returns what was written."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    whole = manifest.model_copy(update={"files": files})
    text = json.dumps(whole.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / MANIFEST, text.encode("utf-8", "surrogateescape"))
    return whole


def read_manifest(folder: Path) -> Manifest:
    """Raises ExportError when `folder` is no bundle, or one of a newer nearkin."""
    path, shown = folder / MANIFEST, printable(str(folder))
    if not path.is_file():
        what = f"is no exported model (no {MANIFEST})" if folder.is_dir() else "is no folder"
        raise ExportError(f"{shown} {what}; give the folder that nearkin export printed.")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError
        raw = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise ExportError(
                f"{shown} has version {version} of the bundle, this nearkin reads {VERSION}; upgrade it."
            )
        return Manifest.model_validate(raw)
    except (OSError, ValueError, RecursionError, ValidationError):
        raise ExportError(
            f"{printable(str(path))} is damaged or no manifest of nearkin; export the run anew."
        ) from None


def check_files(folder: Path, manifest: Manifest) -> list[str]:
    """Compares every file with its checksum; returns the names of files that the manifest does not list.

    Raises ExportError for a file that is missing, changed or outside of the folder.
    """
    wanted = {MODELS[manifest.kind], CHECK} | ({TIMM} if manifest.kind == "timm" else set())
    unlisted = sorted(wanted - set(manifest.files))
    if unlisted:
        raise ExportError(
            f"The manifest of {printable(str(folder))} does not list {listed(unlisted)}; export the run anew."
        )
    for name, wanted_digest in manifest.files.items():
        path = folder / name
        if path.name != name or name in (".", ".."):
            raise ExportError(
                f"The manifest of {printable(str(folder))} names {printable(name)[:80]}, which is outside of it."
            )
        if path.is_symlink() or not path.is_file():
            raise ExportError(f"{printable(str(path))} is missing; export the run anew.")
        if sha256(path) != wanted_digest:
            raise ExportError(
                f"{printable(str(path))} has changed since the export (its SHA-256 differs); export the run anew."
            )
    return sorted({path.name for path in folder.iterdir()} - set(manifest.files) - {MANIFEST})


def unlisted_note(names: list[str]) -> str:
    """The sentence about files that are no part of the bundle."""
    is_ = "is" if len(names) == 1 else "are"
    return f"{counted(len(names), 'other file')} {is_} no part of the bundle: {listed(names)}"
