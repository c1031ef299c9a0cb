"""A job: data loaded, every `auto` resolved, network and objective built, everything checked to fit."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nearkin.config import FREE_ON_RESUME, RunConfig
from nearkin.data import Dataset, Split, load_dataset
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.evaluate.bundle import Built, ModelSpec, build
from nearkin.network import load_weights
from nearkin.runtime import Runtime
from nearkin.train.settings import check, resolve_data, resolve_training
from nearkin.types import Facts

LOOKED_AT = 200  # images whose size is read to find the usual one


class Job(NamedTuple):
    """Everything resolved and built, before the first step. identity: what a resumed run must share."""

    config: RunConfig
    dataset: Dataset
    built: Built
    identity: str


class Result(NamedTuple):
    """run: the run folder. test_top1: a fraction, or None without a test split. metrics: of the test split."""

    run: Path
    test_top1: float | None
    metrics: dict[str, Any]


def prepare(
    config: RunConfig,
    runtime: Runtime,
    *,
    classes: tuple[str, ...] | None = None,
    quiet: bool = True,
) -> Job:
    """Everything that can fail before the first step. classes: of the run that is continued, if one is.

    Raises ConfigError, DataError or ModelError; writes nothing.
    """
    quiet = quiet or not runtime.is_main
    fresh = classes is None
    dataset = _load(config, runtime, classes)
    for note in dataset.notes:
        say(f"note: {note}", quiet)
    train = dataset.splits["train"]
    count = len(train.labels)
    side = _usual_side(train) if config.image_size == "auto" else 0
    config = resolve_data(config, images=count, side=side, channels=dataset.channels)
    check(config, images=count, world_size=runtime.world_size)
    built = _build(config, dataset, pretrained=config.pretrained and fresh)
    _check_accumulation(config, built)
    if config.weights is not None and fresh:
        say(str(load_weights(built.network, config.weights)), quiet)
    config = resolve_training(
        config,
        images=count,
        files=train.images.from_files,
        weights=sum(p.numel() for p in built.network.backbone.parameters()),
        device=runtime.device.type,
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    ).model_copy(update={"options": built.spec.options, "stem": built.spec.stem})
    torch.set_num_threads(int(config.threads))
    return Job(config, dataset, built, _identity(config, dataset))


def say(text: str, quiet: bool) -> None:
    """One line for a person."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def same_options(stored: RunConfig, given: RunConfig, names: set[str]) -> None:
    """Raises ModelError when one of the options `names` would change a run that is continued."""
    old, new = stored.flat(), given.flat()
    changed = sorted(n for n in names - FREE_ON_RESUME if n in old and old[n] != new.get(n))
    if changed:
        shown = ", ".join(f"{n} ({old[n]} -> {new.get(n)})" for n in changed)
        raise ModelError(
            f"A continued run cannot change {printable(shown)}; leave that out, or start a new run."
        )


def _load(config: RunConfig, runtime: Runtime, classes: tuple[str, ...] | None) -> Dataset:
    # The first process downloads and scans; the others then find what it left.
    if not runtime.is_main:
        runtime.barrier()
    dataset = load_dataset(
        config.data,
        channels=config.channels,
        val_split=config.val_split,
        seed=config.seed,
        images_per_class=config.images_per_class,
        bad_images=config.bad_images,
        classes=classes,
        workers=max(1, os.cpu_count() or 1),
    )
    if runtime.is_main:
        runtime.barrier()
    return dataset


def _usual_side(split: Split) -> int:
    """The median short side of up to 200 evenly spread images, in pixels."""
    count = len(split.labels)
    rows = range(0, count, max(1, count // LOOKED_AT))
    return int(statistics.median(min(split.images.read(row).shape[-2:]) for row in rows))


def _build(config: RunConfig, dataset: Dataset, *, pretrained: bool) -> Built:
    torch.manual_seed(config.seed)
    # Weights from a file fit the stem that their model was made with.
    stem = "default" if config.stem == "auto" and config.weights is not None else config.stem
    spec = ModelSpec(
        model=config.model,
        channels=int(config.channels),
        image_size=int(config.image_size),
        stem=stem,
        drop_rate=config.drop_rate,
        drop_path=config.drop_path,
        objective=config.objective,
        options=config.options,
        classes=dataset.classes,
    )
    facts = Facts(
        images=len(dataset.splits["train"].labels),
        classes=len(dataset.classes),
        batch_size=int(config.batch_size),
        image_size=int(config.image_size),
        dim=0,
    )
    return build(spec, pretrained=pretrained, facts=facts)


def _check_accumulation(config: RunConfig, built: Built) -> None:
    if config.accumulate > 1 and any(stage.coupled for stage in built.objective.stages()):
        raise ConfigError(
            f"--accumulate {config.accumulate} would change {config.objective}: its anchors contrast "
            "with the whole batch. Use --accumulate 1 with a smaller --batch-size, more processes, "
            "or the objectives ce or cone."
        )


def _identity(config: RunConfig, dataset: Dataset) -> str:
    fixed = {k: v for k, v in config.flat().items() if k not in FREE_ON_RESUME | {"out"}}
    text = json.dumps([fixed, dataset.classes, dataset.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
