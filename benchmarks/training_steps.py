"""The training steps that `benchmarks.step` and `benchmarks.gpu` time: nearkin's own, and a plain loop around timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearkin.bank import NeighbourBank
from nearkin.config import RunConfig, validate
from nearkin.distributed import Runtime
from nearkin.evaluation.model import Built, ModelSpec, build
from nearkin.network import Network
from nearkin.network.backbone import channel_statistics, create_model
from nearkin.training.defaults import resolve_data, resolve_training
from nearkin.training.optim import build_optimizer, names_layers
from nearkin.training.step import Stepper
from nearkin.types import Batch, Facts, Progress

Step = Callable[[], object]
IMAGES = 1_281_167  # of the data set whose settings are taken


@dataclass(frozen=True)
class Case:
    """What is trained. objective: of nearkin, or `timm` for the plain loop with cross-entropy."""

    model: str
    side: int
    batch: int
    classes: int
    objective: str
    bank: int
    backend: str | None = None  # of torch.compile; None does not compile
    memory_format: str = "auto"


def prepared(case: Case, runtime: Runtime) -> tuple[Step, int]:
    """The step to repeat, on a batch that is on the device already, and the views of each image."""
    config = _config(case, runtime)
    if case.objective == "timm":
        return _plain(case, config, runtime), 1
    stepper = _learner(case, config, runtime)
    if case.backend is not None:
        compile_backbones(stepper, case.backend)
    batch = _batch(case, runtime.device, stepper.stage.views)
    half = stepper.steps_per_epoch // 2  # past CoNe's warm-up, far from the end of an epoch
    epochs = int(config.epochs)
    total = epochs * stepper.steps_per_epoch
    progress = Progress(stepper.stage.name, total // 2, total, epochs // 2, epochs)
    return lambda: stepper.step(batch, progress, half), stepper.stage.views


def compile_backbones(stepper: Stepper, backend: str) -> None:
    """In place, so that the names in a state dict stay; the teacher's too, once the stage has made it."""
    networks = [stepper.network] + ([stepper.teacher.network] if stepper.teacher else [])
    for network in networks:
        network.backbone.compile(backend=backend)


def _config(case: Case, runtime: Runtime) -> RunConfig:
    given = {
        "model": case.model,
        "objective": "ce" if case.objective == "timm" else case.objective,
        "image_size": case.side,
        "batch_size": case.batch,
        "stem": "default",  # timm's own, as in the plain loop
        "precision": runtime.precision,
        "memory_format": case.memory_format,
    }
    if case.objective == "cone":
        given["objective.bank"] = case.bank
    config: RunConfig = validate(RunConfig, given)
    return resolve_data(config, images=IMAGES, side=case.side, channels=3)


def settings(case: Case, runtime: Runtime) -> tuple[RunConfig, Network]:
    """The resolved options and the network."""
    config = _config(case, runtime)
    built = _built(case, config)
    return _trained(config, built.network.backbone, runtime), built.network


def _built(case: Case, config: RunConfig) -> Built:
    spec = ModelSpec(
        model=case.model,
        channels=3,
        image_size=case.side,
        stem="default",
        objective=config.objective,
        options=config.options,
        classes=tuple(map(str, range(case.classes))),
    )
    return build(spec, facts=Facts(IMAGES, case.classes, case.batch, case.side, 0))


def _learner(case: Case, config: RunConfig, runtime: Runtime) -> Stepper:
    """As a training session builds one, without data."""
    built = _built(case, config)
    config = _trained(config, built.network.backbone, runtime)
    runtime.place(built.network)
    runtime.place(built.objective)
    if config.memory_format != "auto":
        built.network.set_memory_format(config.memory_format)
    steps = IMAGES // case.batch
    stepper = Stepper(config, runtime, built.network, built.objective, steps, case.classes)
    stepper.begin(built.objective.stages()[0])
    for module in built.objective.modules():
        if isinstance(module, NeighbourBank):
            _fill(module, case.classes)
    return stepper


def _trained(config: RunConfig, backbone: nn.Module, runtime: Runtime) -> RunConfig:
    return resolve_training(
        config,
        images=IMAGES,
        files=True,
        backbone=backbone,
        weights=sum(p.numel() for p in backbone.parameters()),
        layered=names_layers(backbone),
        device=runtime.device.type,
        ranks=1,
    )


def _fill(bank: NeighbourBank, classes: int) -> None:
    """Every entry used, by images that are not in the batch."""
    size, device = len(bank), bank.keys.device
    keys = normalize(torch.randn(size, bank.keys.shape[1], device=device), dim=1)
    labels = torch.randint(classes, (size,), device=device)
    stored = len(bank.probabilities)
    probabilities = torch.rand(size, stored, device=device).softmax(1) if stored else None
    bank.write(keys, labels, probabilities, IMAGES + torch.arange(size, device=device))


def _batch(case: Case, device: torch.device, views: int) -> Batch:
    shape = (views, case.batch, 3, case.side, case.side)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(case.classes, (case.batch,), device=device)
    return Batch(images, labels, torch.arange(case.batch, device=device))


def _plain(case: Case, config: RunConfig, runtime: Runtime) -> Step:
    """What a person would write around a timm model, with the same optimiser and precision."""
    device = runtime.device
    model = create_model(case.model, {"num_classes": case.classes}, case.side).to(device)
    config = _trained(config, model, runtime)
    # timm's own training script uses contiguous by default.
    last = case.memory_format == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    model.to(memory_format=layout).train()
    optimizer = build_optimizer(
        model,
        config.optimizer,
        lr=float(config.lr),
        weight_decay=float(config.weight_decay),
        momentum=config.momentum,
        nesterov=config.nesterov,
        decay_all=config.decay_all,
        layer_decay=float(config.layer_decay),
    )
    if case.backend is not None:
        model.compile(backend=case.backend)
    mean, std = (
        torch.tensor(each, device=device).view(-1, 1, 1)
        for each in channel_statistics(model, channels=3)
    )
    pixels, labels, _ = _batch(case, device, 1)

    def step() -> None:
        images: Tensor = (pixels[0].float() / 255 - mean) / std
        images = images.contiguous(memory_format=layout)
        with runtime.autocast():
            loss = nn.functional.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step
