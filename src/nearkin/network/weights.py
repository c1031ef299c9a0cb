"""Loads the tensors of a file into a network, and reports what fitted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearkin.errors import ModelError, listed, printable
from nearkin.network.backbone import first_convolutions
from nearkin.network.network import Network
from nearkin.network.tensor_files import read_file, shown, without_prefix

WEIGHTS = "model.safetensors"  # in a run folder


class LoadReport(NamedTuple):
    """Names of the tensors that were loaded, adapted or skipped.

    adapted: those of `loaded` that were fitted to another image size or number of channels.
    adapted, mismatched: name -> its shape in the file and in the network. foreign: of a classifier for other classes.
    """

    file: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, str]
    adapted: dict[str, str]
    foreign: tuple[str, ...] = ()

    @property
    def whole_backbone(self) -> bool:
        """Whether no tensor of the backbone is left as initialised."""
        left = (*self.missing, *self.mismatched)
        return not any(name.startswith("backbone.") for name in left)

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
            _listed("left as initialised, since for other classes", self.foreign),
            _listed("in the file but not used", self.unexpected),
        ]
        return "; ".join(part for part in parts if part)


def load_weights(module: nn.Module, file: Path, *, foreign: tuple[str, ...] = ()) -> LoadReport:
    """Load into `module` the tensors of `file` that fit, and report the others.

    file: `.safetensors` (or a run folder, for its model), or `.pth`, `.pt`, `.bin` of a state dict, bare or inside
    a training script's checkpoint. Names are those of timm or nearkin, with or without a prefix `module.` or
    `backbone.`. In a `Network`, position embeddings for another image size and a first
    convolution for another number of channels are adapted as timm does it for its own weights. Other tensors of
    another shape, like a classifier for another number of classes, are skipped. foreign: how the names of tensors begin
    that are skipped in any case.

    Raises ModelError when the file is no checkpoint or holds more than tensors and plain values, when no parameter fits
    or one is not finite; the module is then unchanged.
    """
    file = _weights_of(file)
    own = module.state_dict(keep_vars=True)
    given = _renamed(read_file(file), own.keys())
    skipped = tuple(name for name in given if foreign and name.startswith(foreign))
    shared = [name for name in own if name in given and name not in skipped]
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
            f"{shown(file)} does not fit this model: it holds {in_file}, ..., the model {here}, ...; "
            "give weights of the same --model under timm's names."
        )
    broken = [name for name in loaded if not bool(given[name].isfinite().all())]
    if broken:
        raise ModelError(f"{shown(file)} holds values that are not finite, first in {broken[0]}.")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(given[name])
    return LoadReport(
        file,
        loaded,
        missing=tuple(name for name in own if name not in given and not _known(name)),
        unexpected=tuple(name for name in given if name not in own),
        mismatched={name: shapes for name, shapes in other.items() if name not in loaded},
        adapted={name: shapes for name, shapes in other.items() if name in loaded},
        foreign=skipped,
    )


def _weights_of(given: Path) -> Path:
    """The file, or that of a run folder. Raises ModelError for a folder without one."""
    if not given.is_dir():
        return given
    if not (given / WEIGHTS).exists():
        raise ModelError(
            f"{shown(given)} has no {WEIGHTS}; a run that has not ended goes on with --resume."
        )
    return given / WEIGHTS


def _known(name: str) -> bool:
    """Of what a file may lack: mean and deviation of the pixels are the model's own, and BatchNorm's counter, which
    torch before 0.4.1 did not store, is read by nothing at a momentum that is not None."""
    return name in ("mean", "std") or name.endswith(".num_batches_tracked")


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


def _renamed(given: dict[str, Tensor], own: Any) -> dict[str, Tensor]:
    """`given` without wrappers' prefixes, and with or without `backbone.`: whichever matches most names of `own`."""
    bare = {without_prefix(name): tensor for name, tensor in given.items()}
    spellings = (
        bare,
        {f"backbone.{name}": tensor for name, tensor in bare.items()},
        {name.removeprefix("backbone."): tensor for name, tensor in bare.items()},
    )
    return max(spellings, key=lambda spelling: len(spelling.keys() & own))


def _fits(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _listed(what: str, names: Sequence[str]) -> str:
    return f"{len(names)} {what} ({listed(names)})" if names else ""


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"
