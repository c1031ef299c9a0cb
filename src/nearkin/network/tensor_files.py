"""Tensors from foreign files: safetensors, and PyTorch checkpoints without running code from them."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearkin.errors import ModelError, first_line, printable

LARGEST_FILE = 8 << 30
LARGEST_HEADER = 16 << 20  # of safetensors: about 100 000 names
MOST_TENSORS = 100_000
PICKLED = (".pth", ".pt", ".bin")
# Keys under which training scripts keep the state dict; an averaged copy first, since scripts evaluate that.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU, by name without the prefixes of DDP and torch.compile.

    Raises ModelError when the file is no checkpoint, holds more than tensors and plain values, or has two tensors
    whose names differ in a prefix only.
    """
    given = read_file(file)
    bare = {without_prefix(name): tensor for name, tensor in given.items()}
    if len(bare) < len(given):
        raise ModelError(f"{shown(file)} holds tensors whose names differ in a prefix only.")
    return bare


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ModelError when it is missing, damaged or oversized."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_file(file)
    try:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > LARGEST_HEADER:
            raise ModelError(
                f"{shown(file)} is damaged or no safetensors file: its header is too long."
            )
        tensors: dict[str, Tensor] = load_file(file, device="cpu")
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{shown(file)} is damaged or no safetensors file ({first_line(error)})."
        ) from None
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU, by the names in the file. Raises ModelError."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in PICKLED:
        return _read_pickled(file)
    raise ModelError(
        f"{shown(file)} is no file of weights; give .safetensors, {', '.join(PICKLED)} or a run folder."
    )


def _check_file(file: Path) -> None:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise ModelError(f"The weights {shown(file)} cannot be loaded: it {what}.")
    if file.stat().st_size > LARGEST_FILE:
        raise ModelError(
            f"{shown(file)} is larger than {LARGEST_FILE >> 30} GiB and is not loaded."
        )


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """The only reader of pickled files: tensors and plain containers, without running code from the file."""
    _check_file(file)
    try:
        _check_zip(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which torch then reads or refuses
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{shown(file)} cannot be read ({first_line(error)}).") from None
    except Exception as error:  # a malicious file can make the reader raise any kind
        if "GLOBAL" in str(error):
            raise ModelError(
                f"{shown(file)} holds more than tensors and plain values and is not loaded, since that "
                "could run code; save its state dict as .safetensors where you trust it."
            ) from None
        raise ModelError(f"{shown(file)} is damaged or no PyTorch checkpoint.") from None
    return _tensors(content, file)


def _check_zip(file: Path) -> None:
    """Raises ModelError for an archive that unpacks to more than its size: PyTorch stores without compression."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(file) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > file.stat().st_size * 1.05:
        raise ModelError(
            f"{shown(file)} declares {declared} bytes, more than it holds; it is not loaded."
        )


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, bare or inside a checkpoint."""
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    entries = content if isinstance(content, Mapping) else {}
    tensors = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ModelError(
            f"{shown(file)} holds no state dict; give a file that maps names to tensors."
        )
    if len(tensors) > MOST_TENSORS:
        raise ModelError(f"{shown(file)} holds more than {MOST_TENSORS} tensors and is not loaded.")
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ModelError(
            f"{shown(file)} holds {printable(odd[0])[:80]}, which is no plain dense tensor."
        )
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Dense, in memory, without shared elements: a stride of 0 claims terabytes from a file of kilobytes."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    # A transposed tensor, like a filter from TensorFlow, is plain as well.
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def without_prefix(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def shown(file: Path) -> str:
    return printable(str(file))
