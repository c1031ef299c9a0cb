"""A model on disk: weights in safetensors, and in JSON everything else that its use needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nearkin.config import ModelOptions, validate
from nearkin.data.transforms import EvalSpec
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.evaluation.options import DESCRIPTION as DESCRIPTION
from nearkin.evaluation.options import EVIDENCE, check_run
from nearkin.files import sha256, write_atomic
from nearkin.network import Network, build_backbone, default_memory_format, read_safetensors
from nearkin.network.weights import WEIGHTS as WEIGHTS
from nearkin.objectives import Objective, get

FORMAT = 1


class ModelSpec(BaseModel):
    """What a network is built from: backbone, input, the objective's options (they shape the heads), classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_options: ModelOptions = {}
    channels: int = Field(ge=1)
    image_size: int = Field(ge=1)
    stem: Literal["auto", "default", "small"]
    drop_rate: float = 0.0
    drop_path: float = 0.0
    objective: str
    options: dict[str, Any]
    classes: tuple[str, ...]


class Description(BaseModel):
    """`model.json`. metrics: totals of the final evaluation; tables are in files beside it. temperature: divides the
    logits of probabilities that are shown as such (see `evaluation.calibration`); None where it is not known. digests:
    name -> SHA-256 of the files that belong to the model; empty in runs from before these were kept. imported: the
    weights were not trained here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    nearkin: str
    spec: ModelSpec
    transform: EvalSpec
    heads: tuple[str, ...]
    metrics: dict[str, Any] = {}
    temperature: float | None = Field(default=None, gt=0)
    digests: dict[str, str] = {}
    imported: bool = False


class Built(NamedTuple):
    """A network, the objective that shaped its heads, and what both were built from, without `auto`."""

    network: Network
    objective: Objective
    spec: ModelSpec


class Bundle(NamedTuple):
    """A model ready for use."""

    network: Network
    description: Description

    @property
    def classes(self) -> tuple[str, ...]:
        return self.description.spec.classes


def build(
    spec: ModelSpec,
    *,
    options: Objective.Config | None = None,
    load_pretrained: bool = False,
    pretrained: bool = False,
    images: int = 1,
    batch_size: int = 1,
    device: str = "cpu",
) -> Built:
    """Backbone, heads and objective.

    options: the objective's, where they are validated already; by default those of `spec`. load_pretrained: load timm's
    or packaged weights. pretrained: whether the backbone will have trained weights, these or others. images,
    batch_size, device: of the training. From the last four follow `auto` options; a trained model has none.

    Raises ConfigError for an unknown model, objective or option.
    """
    kind = get(spec.objective)
    if options is None:
        options = cast("Objective.Config", validate(kind.Config, spec.options, prefix="objective."))
    backbone = build_backbone(
        spec.model,
        pretrained=load_pretrained,
        channels=spec.channels,
        image_size=spec.image_size,
        stem=spec.stem,
        drop_path=spec.drop_path,
        options=spec.model_options,
    )
    objective = kind(
        options,
        dim=backbone.dim,
        classes=len(spec.classes),
        images=images,
        batch_size=batch_size,
        device=device,
        pretrained=pretrained,
    )
    network = Network(
        backbone.module,
        objective.heads,
        dim=backbone.dim,
        mean=backbone.mean,
        std=backbone.std,
        drop_rate=spec.drop_rate,
    )
    resolved = {"options": objective.config.model_dump(mode="json"), "stem": backbone.stem}
    return Built(network, objective, spec.model_copy(update=resolved))


def save_bundle(folder: Path, description: Description, weights: dict[str, Tensor]) -> None:
    """Write model.safetensors and model.json, each whole or not at all; the latter with the digests of the former and
    of the kin, if they are there."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    write_atomic(folder / WEIGHTS, save(plain))
    there = (name for name in (WEIGHTS, EVIDENCE) if (folder / name).exists())
    digests = {name: sha256(folder / name) for name in there}
    description = description.model_copy(update={"digests": digests})
    text = json.dumps(description.model_dump(mode="json"), indent=1, allow_nan=False)
    write_atomic(folder / DESCRIPTION, text.encode("utf-8", "surrogateescape"))


def check_digest(run: Path, description: Description, name: str) -> None:
    """Raises ModelError for a file that is not the one that was saved with this model."""
    wanted = description.digests.get(name)
    try:
        fits = wanted is None or sha256(run / name) == wanted
    except OSError:
        return  # who reads it says why it cannot be read
    if not fits:
        raise ModelError(
            f"{printable(str(run / name))} is not the file that was saved with {DESCRIPTION} (its SHA-256 differs): it "
            "is damaged, or of another run; put the right one back."
        )


def load_bundle(run: Path, device: torch.device) -> Bundle:
    """The model of a run folder, in eval mode, in float32 (float64 where its weights are).

    Raises ModelError when it is missing, damaged or written by a newer version.
    """
    description = read_description(run)
    try:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, and replaced
            built = build(description.spec)
    except ConfigError as error:
        own = description.spec.objective not in Objective.registry
        advice = " If it is one of your own, import its module first." if own else ""
        raise ModelError(
            f"The model of {printable(str(run))} cannot be built: {error}{advice}"
        ) from None
    check_digest(run, description, WEIGHTS)
    tensors = read_safetensors(run / WEIGHTS)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        built.network.double()
    try:
        built.network.load_state_dict(tensors)
    except RuntimeError:
        raise ModelError(
            f"{printable(str(run / WEIGHTS))} does not fit {DESCRIPTION}; were files of two runs mixed?"
        ) from None
    built.network.activate(description.heads, freeze_backbone=False)
    built.network.to(device).eval()
    side = description.spec.image_size
    built.network.set_memory_format(
        default_memory_format(built.network.backbone, device.type, side)
    )
    return Bundle(built.network, description)


def read_description(run: Path) -> Description:
    """`model.json` of a run folder. Raises ModelError as `load_bundle`."""
    path = run / DESCRIPTION
    check_run(run)
    try:
        raw = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        version = raw.get("format") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise ModelError(
                f"{printable(str(path))} has format {version}, this nearkin reads {FORMAT}; upgrade it."
            )
        return Description.model_validate(raw)
    except ConfigError as error:
        raise ModelError(f"{printable(str(path))} describes a forbidden model: {error}") from None
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{printable(str(path))} is no description of a nearkin model.") from None
