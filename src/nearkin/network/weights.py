"""Weights from files: safetensors, and PyTorch checkpoints without running code from them."""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearkin.errors import ModelError, printable
from nearkin.network.backbone import first_convolutions, first_line
from nearkin.network.network import Network

LARGEST_FILE = 8 << 30
LARGEST_HEADER = 16 << 20  # of safetensors: about 100 000 names
MOST_TENSORS = 100_000
PICKLED = (".pth", ".pt", ".bin")
RUN_WEIGHTS = "model.safetensors"  # in a run folder
# Keys under which training scripts keep the state dict; an averaged copy first, since scripts evaluate that.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of DDP and torch.compile


class LoadReport(NamedTuple):
    """Names of the tensors that were loaded, adapted or skipped.

    adapted: those of `loaded` that were fitted to another image size or number of channels.
    adapted, mismatched: name -> its shape in the file and in the network.
    """

    file: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, str]
    adapted: dict[str, str]

    def __str__(self) -> str:
        adapted, mismatched = (
            [f"{name} ({shapes})" for name, shapes in each.items()]
            for each in (self.adapted, self.mismatched)
        )
        parts = [
            f"{len(self.loaded)} tensors loaded from {printable(str(self.file))}",
            _listed("adapted to this image size or number of channels", adapted),
            _listed("left as initialised, since not in the file", self.missing),
            _listed("left as initialised, since of another shape", mismatched),
            _listed("in the file but not used", self.unexpected),
        ]
        return "; ".join(part for part in parts if part)


def load_weights(module: nn.Module, file: Path) -> LoadReport:
    """Load into `module` the tensors of `file` that fit, and report the others.

    file: `.safetensors` (or a run folder, for its model), or `.pth`, `.pt`, `.bin` of a state dict, bare or inside
    a training script's checkpoint. Names are those of timm or nearkin, with or without a prefix `module.` or
    `backbone.`. In a `Network`, position embeddings for another image size and a first
    convolution for another number of channels are adapted as timm does it for its own weights. Other tensors of
    another shape, like a classifier for other classes, are skipped.

    Raises ModelError when the file is no checkpoint or holds more than tensors and plain values, when no parameter fits
    or one is not finite; the module is then unchanged.
    """
    file = file / RUN_WEIGHTS if file.is_dir() else file
    own = module.state_dict(keep_vars=True)
    given = _renamed(_read(file), own.keys())
    shared = [name for name in own if name in given]
    other = {
        name: f"{_shape(given[name])} in the file, {_shape(own[name])} here"
        for name in shared
        if not _fits(given[name], own[name])
    }
    if other and isinstance(module, Network):
        given |= _adapted(module, given, own, list(other))
    loaded = tuple(name for name in shared if _fits(given[name], own[name]))
    if not any(isinstance(own[name], nn.Parameter) for name in loaded):
        in_file = printable(next(iter(given), "nothing"))[:80]
        here = next((n for n, tensor in own.items() if isinstance(tensor, nn.Parameter)), "nothing")
        raise ModelError(
            f"{_shown(file)} does not fit this model: it holds {in_file}, ..., the model {here}, ...; "
            "give weights of the same --model under timm's names."
        )
    broken = [name for name in loaded if not bool(given[name].isfinite().all())]
    if broken:
        raise ModelError(f"{_shown(file)} holds values that are not finite, first in {broken[0]}.")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(given[name])
    return LoadReport(
        file,
        loaded,
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mismatched={name: shapes for name, shapes in other.items() if name not in loaded},
        adapted={name: shapes for name, shapes in other.items() if name in loaded},
    )


def _adapted(
    network: Network, given: Mapping[str, Tensor], own: Mapping[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Those of `names`, which have another shape in the file, that fit once timm has adapted them."""
    from timm.models._manipulate import adapt_input_conv

    backbone, prefix = network.backbone, "backbone."
    family = sys.modules[type(backbone).__module__]
    names_of_filter = ("checkpoint_filter_fn", "_checkpoint_filter_fn")
    filters = [getattr(family, name) for name in names_of_filter if hasattr(family, name)]
    tensors = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
    if filters:
        # Position embeddings, by the function with which timm reads weights of this kind of model.
        # A file can hold anything under these names. Warnings: of timm's code, about speed.
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            tensors = dict(filters[0](tensors, backbone))
    channels = len(network.mean)
    for name, convolution in first_convolutions(backbone).items():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.dim() != 4:
            continue
        # A layer that first moves pixels into channels has several inputs for each channel of the image.
        in_file = weight.shape[1] * channels // convolution.weight.shape[1]
        with suppress(NotImplementedError, AssertionError, ValueError):
            tensors[f"{name}.weight"] = adapt_input_conv(channels, weight, base_chans=in_file)
    bare = {name: tensors.get(name.removeprefix(prefix)) for name in names}
    return {n: t for n, t in bare.items() if isinstance(t, Tensor) and _fits(t, own[n])}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU, by name without the prefixes of DDP and torch.compile.

    Raises ModelError when the file is no checkpoint, holds more than tensors and plain values, or has two tensors
    whose names differ in a prefix only.
    """
    given = _read(file)
    bare = {_stripped(name): tensor for name, tensor in given.items()}
    if len(bare) < len(given):
        raise ModelError(f"{_shown(file)} holds tensors whose names differ in a prefix only.")
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
                f"{_shown(file)} is damaged or no safetensors file: its header is too long."
            )
        tensors: dict[str, Tensor] = load_file(file, device="cpu")
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{_shown(file)} is damaged or no safetensors file ({first_line(error)})."
        ) from None
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in PICKLED:
        return _read_pickled(file)
    raise ModelError(
        f"{_shown(file)} is no file of weights; give .safetensors, {', '.join(PICKLED)} or a run folder."
    )


def _check_file(file: Path) -> None:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise ModelError(f"The weights {_shown(file)} cannot be loaded: it {what}.")
    if file.stat().st_size > LARGEST_FILE:
        raise ModelError(
            f"{_shown(file)} is larger than {LARGEST_FILE >> 30} GiB and is not loaded."
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
        raise ModelError(f"{_shown(file)} cannot be read ({first_line(error)}).") from None
    except Exception as error:  # a malicious file can make the reader raise any kind
        if "GLOBAL" in str(error):
            raise ModelError(
                f"{_shown(file)} holds more than tensors and plain values and is not loaded, since that "
                "could run code; save its state dict as .safetensors where you trust it."
            ) from None
        raise ModelError(f"{_shown(file)} is damaged or no PyTorch checkpoint.") from None
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
            f"{_shown(file)} declares {declared} bytes, more than it holds; it is not loaded."
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
            f"{_shown(file)} holds no state dict; give a file that maps names to tensors."
        )
    if len(tensors) > MOST_TENSORS:
        raise ModelError(
            f"{_shown(file)} holds more than {MOST_TENSORS} tensors and is not loaded."
        )
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ModelError(
            f"{_shown(file)} holds {printable(odd[0])[:80]}, which is no plain dense tensor."
        )
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Dense, in memory, without shared elements: a stride of 0 claims terabytes from a file of kilobytes."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _renamed(given: dict[str, Tensor], own: Any) -> dict[str, Tensor]:
    """`given` without wrappers' prefixes, and with or without `backbone.`: whichever matches most names of `own`."""
    bare = {_stripped(name): tensor for name, tensor in given.items()}
    spellings = (
        bare,
        {f"backbone.{name}": tensor for name, tensor in bare.items()},
        {name.removeprefix("backbone."): tensor for name, tensor in bare.items()},
    )
    return max(spellings, key=lambda spelling: len(spelling.keys() & own))


def _stripped(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _listed(what: str, names: tuple[str, ...] | list[str], most: int = 4) -> str:
    if not names:
        return ""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({', '.join(printable(n) for n in names[:most])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"


def _shown(file: Path) -> str:
    return printable(str(file))
