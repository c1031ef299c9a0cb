"""`--minutes`: how many epochs, and how many blocks that learn, fit into the time, from a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch

from nearkin.config import RunConfig
from nearkin.data.dataset import Dataset
from nearkin.distributed import Runtime
from nearkin.errors import counted
from nearkin.evaluation.evaluator import NEIGHBOURS, Evaluator
from nearkin.evaluation.kin import MOST_KEYS
from nearkin.evaluation.model import Built
from nearkin.network import Network, blocks_below_heads, names_layers
from nearkin.objectives import Objective
from nearkin.settings import Settings
from nearkin.training.batches import train_batches
from nearkin.training.defaults import is_pretrained, warmup_epochs
from nearkin.training.loop import validation_interval
from nearkin.training.step import Stepper
from nearkin.types import Progress

RESERVE = 0.06  # share of the time for what is not measured: saving, and a machine that slows down
ENOUGH = 5  # epochs; where fewer fit, fewer blocks learn (docs/decisions/018-photos.md)
STEPS = 12  # at most, in a measurement
SECONDS = 5.0  # after which it ends
WARM = 2  # steps that do not count
LONG = 30.0  # seconds after which one of them does not, either
PROBE_SHARE, LEAST_FITTED = 1 / 3, 1_000
IMAGES = 128  # that are evaluated to measure validation


class Plan(NamedTuple):
    """settings: with the epochs and blocks chosen. epoch: seconds of one. left: seconds for training."""

    settings: Settings
    epoch: float
    left: float

    def __str__(self) -> str:
        epochs, minutes = self.settings.epochs, self.left / 60
        if epochs == 0:
            return (
                f"no fine-tuning: an epoch takes about {self.epoch / 60:.1f} min, and {max(0.0, minutes):.1f} min are "
                "left; give more --minutes, or --epochs"
            )
        took = epochs * self.epoch / 60
        return f"plan: {counted(epochs, 'epoch')} in about {took:.1f} of {max(0.0, minutes):.1f} min that are left"


def plan(
    settings: Settings,
    built: Built,
    dataset: Dataset,
    evaluator: Evaluator,
    runtime: Runtime,
    *,
    config: RunConfig,
    spent: float,
) -> Plan:
    """The largest number of epochs, up to `settings.epochs`, with which the run ends within `settings.minutes`.

    config: the options as given; from trained weights, with `auto` blocks, fewer of them learn where fewer than ENOUGH
    epochs fit. spent: seconds since the start of the run. A run without a probe trains at least one epoch a stage.
    All processes choose the same. Changes no weights and no global random state.
    """
    started = time.monotonic()
    cost = _evaluation(built, dataset, evaluator)
    validation, after = cost(_count(dataset, "val")), sum(map(cost, _evaluated(settings, dataset)))
    if validation:
        keys = min(NEIGHBOURS, _count(dataset, "train"))
        validation += _without_classifier(built.objective) * cost(keys)
    stages = len(built.objective.stages())
    found: list[Plan] = []
    choose = config.blocks == "auto" and is_pretrained(settings)
    for blocks in _candidates(settings, built, choose):
        tried = settings.model_copy(update={"blocks": blocks})
        epoch = _epoch(tried, built, dataset, runtime)
        gone = spent + time.monotonic() - started + after
        left = settings.minutes * 60 * (1 - RESERVE) - gone
        epoch, validation, left = runtime.share((epoch, validation, left))
        fitting = _fitting(epoch, validation, left, settings.epochs, dataset)
        if fitting < stages:
            fitting = 0 if settings.probe else stages
        epoch += validation / validation_interval(dataset, fitting)
        chosen = {"epochs": fitting, "minutes": 0.0}
        if config.warmup_epochs == "auto":
            chosen["warmup_epochs"] = warmup_epochs(fitting)
        found.append(Plan(tried.model_copy(update=chosen), epoch, left))
        if fitting >= min(ENOUGH, settings.epochs) or left <= 0:
            break
    if all(each.left < each.epoch for each in found):
        return min(found, key=lambda each: each.epoch)
    return max(found, key=lambda each: each.settings.epochs)


def probe_images(
    settings: Settings, built: Built, dataset: Dataset, evaluator: Evaluator, runtime: Runtime
) -> int:
    """How many training images the probe reads, so that their features take at most PROBE_SHARE of `settings.minutes`.
    Halved until they do, so that the next run finds the same features in the cache. All processes choose the same."""
    most = min(settings.probe_images, _count(dataset, "train"))
    if settings.minutes == 0 or most <= LEAST_FITTED:
        return settings.probe_images
    cost = _evaluation(built, dataset, evaluator)
    while most > LEAST_FITTED and cost(2 * most) > PROBE_SHARE * 60 * settings.minutes:
        most //= 2
    return runtime.share(most)


def fix_parts(network: Network, settings: Settings) -> None:
    """Freeze the blocks and the BatchNorm statistics that the settings exclude from training."""
    if settings.blocks != "all":
        network.learn_blocks(settings.blocks)
    if settings.freeze_batchnorm:
        network.keep_statistics()


def _fitting(training: float, validation: float, left: float, most: int, dataset: Dataset) -> int:
    """The largest number of epochs that takes at most `left` seconds. training, validation: seconds of each."""

    def fits(epochs: int) -> bool:
        return epochs * (training + validation / validation_interval(dataset, epochs)) <= left

    tried = range(min(most, max(0, int(left / training))), 0, -1)
    return next(filter(fits, tried), 0)


def _candidates(settings: Settings, built: Built, choose: bool) -> list[int | str]:
    """The blocks to try: those of the settings, then half as many, and so on."""
    backbone = built.network.backbone
    if not choose or settings.freeze_backbone or not names_layers(backbone):
        return [settings.blocks]
    most = max(blocks_below_heads(backbone).values())
    number = most if settings.blocks == "all" else min(settings.blocks, most)
    tried: list[int | str] = [settings.blocks]
    while number > 0:
        number //= 2
        tried.append(number)
    # Without a block the heads alone learn, and some have no weights.
    bare = any(
        all(not list(built.network.heads[name].parameters()) for name in stage.heads)
        for stage in built.objective.stages()
    )
    return [blocks for blocks in tried if not (bare and blocks == 0)] or [settings.blocks]


def _epoch(settings: Settings, built: Built, dataset: Dataset, runtime: Runtime) -> float:
    """Seconds of an epoch, by a few steps of each stage on copies of network and objective."""
    split = dataset.splits["train"]
    steps = len(split.labels) // settings.batch_size
    network, objective = deepcopy(built.network), deepcopy(built.objective)
    fix_parts(network, settings)
    seconds = 0.0
    scale = runtime.scaler.state_dict()
    with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
        stepper = Stepper(settings, runtime, network, objective, steps, len(dataset.classes))
        for stage in objective.stages():
            stepper.begin(stage)
            batches = train_batches(
                settings, split, runtime, views=stage.views, first=0, last=STEPS
            )
            times: list[float] = []
            began = previous = time.monotonic()
            # As at the end of the stage: in a warm-up there is less to compute.
            last = max(1, settings.epochs) * steps + STEPS
            for step, batch in enumerate(batches):
                at = Progress(stage.name, last - STEPS + step, last, 0, 1)
                stepper.step(batch, at, step).total.item()
                times.append(time.monotonic() - previous)
                previous += times[-1]
                # Every process takes as many steps as the first.
                enough = WARM if previous - began < LONG else 1
                if runtime.share(len(times) > enough and previous - began > SECONDS):
                    break
            warm = times[WARM:] or times[1:] or times
            seconds += stage.share * sum(warm) / len(warm)
    runtime.scaler.load_state_dict(scale)  # a run that goes on has not measured
    return seconds * steps


def _without_classifier(objective: Objective) -> float:
    """The share of the training whose validations compare with embedded training images instead."""
    return sum(
        stage.share
        for stage in objective.stages()
        if all(objective.heads[name].writes != "logits" for name in stage.heads)
    )


def _count(dataset: Dataset, name: str) -> int:
    return len(dataset.splits[name].labels) if name in dataset.splits else 0


def _evaluated(settings: Settings, dataset: Dataset) -> list[int]:
    """How many images are evaluated in each pass that is not of an epoch: the probe's validation, the result, the kin
    with their temperature, and the new fit of the classifier."""
    train, val = _count(dataset, "train"), _count(dataset, "val")
    passes = [_count(dataset, "test") or val, min(MOST_KEYS, train), val]
    if settings.probe:
        passes.append(val)
    if settings.refit:  # of two views; the fit takes about as long
        passes += [val, val, 4 * (min(settings.probe_images, train) + val)]
    return passes


def _evaluation(built: Built, dataset: Dataset, evaluator: Evaluator) -> Callable[[int], float]:
    """Seconds to evaluate so many images: those of the first one, in which workers start, and of each other."""
    split = dataset.splits.get("val", dataset.splits["train"])
    count = min(IMAGES, len(split.labels))

    def seconds(images: int) -> float:
        started = time.monotonic()
        evaluator.embeddings(built.network, split, range(images))
        return time.monotonic() - started

    first = seconds(1)
    each = max(0.0, seconds(count) - first) / max(1, count - 1)
    if count == 1:
        each = first
    return lambda images: first + each * images if images else 0.0
