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
from nearkin.settings import DataSettings, Settings
from nearkin.training.defaults import DataFacts, resolve, resolve_data
from nearkin.training.optim import build_optimizer
from nearkin.training.prepare import network_facts
from nearkin.training.step import Stepper
from nearkin.types import Batch, Progress

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
    """The step to repeat, on a batch that is on the device already, and the crops of an image for the student."""
    config = _config(case, runtime)
    if case.objective == "timm":
        return _plain(case, config, runtime), 1
    stepper = _stepper(case, config, runtime)
    if case.backend is not None:
        compile_backbones(stepper, case.backend)
    batch = _batch(case, runtime.device, stepper.stage.views)
    half = stepper.steps_per_epoch // 2  # past CoNe's warm-up, far from the end of an epoch
    epochs = config.epochs
    total = epochs * stepper.steps_per_epoch
    progress = Progress(stepper.stage.name, total // 2, total, epochs // 2, epochs)
    return lambda: stepper.step(batch, progress, half), stepper.stage.student_views


def compile_backbones(stepper: Stepper, backend: str) -> None:
    """In place, so that the names in a state dict stay; the teacher's too, once the stage has made it."""
    networks = [stepper.network] + ([stepper.teacher.network] if stepper.teacher else [])
    for network in networks:
        network.backbone.compile(backend=backend)


def _config(case: Case, runtime: Runtime) -> DataSettings:
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
    return resolve_data(validate(RunConfig, given), DataFacts(IMAGES, case.side, channels=3))


def settings(case: Case, runtime: Runtime) -> tuple[Settings, Network]:
    """The settings and the network."""
    config = _config(case, runtime)
    built = _built(case, config)
    return _resolved(config, built, runtime), built.network


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
    return build(spec, images=IMAGES, batch_size=case.batch)


def _stepper(case: Case, config: DataSettings, runtime: Runtime) -> Stepper:
    """As `Trainer` builds one, without data."""
    built = _built(case, config)
    resolved = _resolved(config, built, runtime)
    runtime.place(built.network)
    runtime.place(built.objective)
    built.network.set_memory_format(resolved.memory_format)
    steps = IMAGES // case.batch
    stepper = Stepper(resolved, runtime, built.network, built.objective, steps, case.classes)
    stepper.begin(built.objective.stages()[0])
    for module in built.objective.modules():
        if isinstance(module, NeighbourBank):
            _fill(module, case.classes)
    return stepper


def _resolved(config: DataSettings, built: Built, runtime: Runtime) -> Settings:
    return resolve(config, network_facts(config, built, runtime, images=IMAGES, files=True))


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


def _plain(case: Case, config: DataSettings, runtime: Runtime) -> Step:
    """What a person would write around a timm model, with the same optimiser and precision."""
    device = runtime.device
    model = create_model(case.model, {"num_classes": case.classes}, case.side).to(device)
    resolved = _resolved(config, _built(case, config), runtime)
    # timm's own training script uses contiguous by default.
    last = case.memory_format == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    model.to(memory_format=layout).train()
    optimizer = build_optimizer(model, resolved)
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
