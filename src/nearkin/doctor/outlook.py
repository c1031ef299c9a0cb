"""What an objective will meet in these data: positives, memory, and the loss that means collapse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count as counting
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearkin.bank import NeighbourBank
from nearkin.catalogue import check_objective
from nearkin.config import RunConfig, validate
from nearkin.data.sources.listing import Listing
from nearkin.device import choose_device, choose_precision
from nearkin.distributed import Runtime
from nearkin.doctor.findings import Finding
from nearkin.errors import DataError
from nearkin.network import Network
from nearkin.objectives import Stage
from nearkin.training.batches import draw_of
from nearkin.training.prepare import Prepared, missing_positives, prepare, validated_options
from nearkin.types import Batch, Outputs, Progress

MEASURED = 2  # images whose activations are measured
MIB = 2**20


class Outlook(NamedTuple):
    """positives: other images of an anchor's class in its batch, on average. lonely: share of anchors without any.
    bank: its entries, 0 without one. kin: bank entries of an anchor's class, on average. memory: bytes of a step by
    part. collapse: stage -> term -> its value for constant embeddings and a full bank."""

    positives: float
    bank: int
    kin: float
    memory: dict[str, int]
    collapse: dict[str, dict[str, float]]


def checked_forecast(data: str, options: Mapping[str, Any]) -> RunConfig:
    """The options of the training to forecast. Raises ConfigError."""
    config: RunConfig = validate(RunConfig, {"data": data, **options})
    if config.objective != "auto":
        check_objective(config.objective, config.options)
        validated_options(config)
    return config


def objective_findings(listing: Listing, config: RunConfig) -> Iterator[Finding]:
    """What `nearkin train` with these options would meet. Raises ConfigError for options that do not fit the data."""
    device = choose_device(config.device)
    with Runtime(device=device, precision=choose_precision(config.precision, device)) as runtime:
        try:
            # As if it were continued: then no weights are loaded, which would not change anything here.
            prepared = prepare(config, runtime, listing=listing, begun=True, look=False)
        except DataError as error:
            yield Finding("error", "objective", f"training would not start: {error}".rstrip("."))
            return
        found = outlook(prepared)
    yield from _findings(prepared, found, automatic=config.sampler == "auto")


def _findings(prepared: Prepared, found: Outlook, *, automatic: bool) -> Iterator[Finding]:
    settings = prepared.settings
    start = f"{settings.objective} with a batch of {settings.batch_size} and the sampler {settings.sampler}"
    bank = f", and {found.kin:.1f} in a bank of {found.bank} entries" if found.bank else ""
    text = f"{start}: an image meets {found.positives:.1f} others of its class in its batch, on average{bank}"
    train = prepared.dataset.splits["train"]
    warning = missing_positives(settings, prepared.built, train, automatic=automatic)
    yield Finding("ok", "positives", text)
    if warning is not None:
        yield Finding("warning", "no-positives", warning.rstrip("."))
    parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in found.memory.items())
    total = sum(found.memory.values()) / MIB
    yield Finding("ok", "memory", f"a step needs about {total:.0f} MiB: {parts}")
    for stage, terms in found.collapse.items():
        shown = ", ".join(f"{term} {value:.4f}" for term, value in terms.items())
        text = (
            f"a loss that stays at {shown} in the stage {stage} has learned nothing: to the network all images look "
            "alike (collapse)"
        )
        yield Finding("ok", "collapse", text)


def outlook(prepared: Prepared) -> Outlook:
    """Computed from the first epoch's draws and from the network on two images. It changes the network's statistics."""
    settings, objective = prepared.settings, prepared.built.objective
    labels = prepared.dataset.splits["train"].labels
    batch = settings.batch_size
    draws = draw_of(settings, labels)(0)
    steps = len(labels) // batch
    drawn = labels[draws.rows[: steps * batch]].reshape(steps, batch)
    same = [np.bincount(row)[row] - 1 for row in drawn]
    banks = [module for module in objective.modules() if isinstance(module, NeighbourBank)]
    shares = np.bincount(labels) / len(labels)
    entries = sum(map(len, banks))
    return Outlook(
        float(np.mean(same)),
        entries,
        float(entries * (shares**2).sum()),
        _memory(prepared),
        {stage.name: _collapse(prepared, stage, drawn) for stage in objective.stages()},
    )


def _memory(prepared: Prepared) -> dict[str, int]:
    """Bytes of weights with their gradients and the optimiser's moments, of activations, and of the bank. Activations
    are those that autograd keeps of two and of four images, continued in a line to the images of a step: parts such as
    copies of weights in another memory format are there once."""
    settings, network, objective = (
        prepared.settings,
        prepared.built.network,
        prepared.built.objective,
    )
    stages = objective.stages()
    stage = max(stages, key=lambda stage: stage.student_views)
    network.activate(stage.heads, stage.freeze_backbone or settings.freeze_backbone)
    network.train()
    network.key.set(0, 0, 0, 1)  # of dropout's masks
    few, more = (_kept(network, _images(prepared).repeat(times, 1, 1, 1)) for times in (1, 2))
    each = (more - few) / MEASURED
    images = stage.student_views * settings.batch_size / settings.accumulate
    activations = few + each * (images - MEASURED)
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    every = sum(p.numel() * p.element_size() for p in network.parameters())
    copies = 1 + any(stage.teacher is not None for stage in stages) + (settings.ema > 0)
    moments = 1 if settings.optimizer == "sgd" else 2
    bank = sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers())
    narrow = 2 if settings.precision in ("bf16", "fp16") else 1
    memory = {
        "weights and optimiser": copies * every + (1 + moments) * trained,
        "activations": int(activations / narrow),
    }
    return memory | ({"bank": bank} if bank else {})


def _kept(network: Network, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)
    del outputs
    return sum(kept.values())


def _images(prepared: Prepared) -> Tensor:
    side, channels = prepared.settings.image_size, prepared.settings.channels
    device = next(prepared.built.network.parameters()).device
    return torch.zeros(MEASURED, channels, side, side, dtype=torch.uint8, device=device)


@torch.no_grad()
def _collapse(
    prepared: Prepared, stage: Stage, drawn: np.typing.NDArray[np.int64]
) -> dict[str, float]:
    """The terms of the loss for the first batch, at the end of the stage, with a bank of later batches."""
    settings, network, objective = (
        prepared.settings,
        prepared.built.network,
        prepared.built.objective,
    )
    network.activate(stage.heads, stage.freeze_backbone or settings.freeze_backbone)
    network.eval()
    single = network(_images(prepared))
    batch, views = settings.batch_size, stage.student_views
    student, teacher = _repeated(single, views * batch), None
    if stage.teacher is not None:
        teacher = _repeated(single, batch if stage.teacher.crop == "own" else views * batch)
    device = single.features.device
    numbers = counting(0)

    def drawn_batch(row: np.typing.NDArray[np.int64]) -> Batch:
        index = torch.arange(batch, device=device) + batch * next(numbers)
        return Batch(torch.empty(0), torch.from_numpy(row).to(device), index)

    banks = [len(module) for module in objective.modules() if isinstance(module, NeighbourBank)]
    for step in range(ceil(max(banks, default=0) / batch)):
        objective.update(drawn_batch(drawn[step % len(drawn)]), student, teacher)
    epochs = max(1, round(stage.share * settings.epochs))
    steps = epochs * len(drawn)
    end = Progress(stage.name, steps - 1, steps, epochs - 1, epochs)
    loss = objective.at_collapse(drawn_batch(drawn[0]), student, teacher, end)
    return {name: float(value) for name, value in loss.terms.items()}


def _repeated(outputs: Outputs, rows: int) -> Outputs:
    return Outputs(
        *(None if o is None else o[:1].float().expand(rows, *o.shape[1:]) for o in outputs)  # type: ignore[arg-type]
    )
