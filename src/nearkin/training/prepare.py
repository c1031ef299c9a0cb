"""A job: data loaded, every `auto` resolved, network and objective built, everything checked to fit."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin.config import FREE_ON_RESUME, RunConfig
from nearkin.data.cache import Contents, Where, make_pack, packed, room_in_memory
from nearkin.data.dataset import Dataset, Split, load_dataset
from nearkin.data.images import Files
from nearkin.data.sampling import Draw, drawing
from nearkin.distributed import Precision, Runtime
from nearkin.errors import ModelError, printable
from nearkin.evaluation.model import (
    DESCRIPTION,
    WEIGHTS,
    Built,
    ModelSpec,
    build,
    read_description,
)
from nearkin.network import load_weights
from nearkin.process import launched
from nearkin.training.autotune import NAMES, tuned
from nearkin.training.checks import (
    check_built,
    counted_share,
    expected_share,
    fit_workers,
    warning,
)
from nearkin.training.defaults import (
    check,
    read_whole,
    resolve_data,
    resolve_training,
    side_in_cache,
    side_of_scaled,
)
from nearkin.training.optim import names_layers
from nearkin.types import Facts

LOOKED_AT = 200  # images whose size is read to find the usual one


class Prepared(NamedTuple):
    """Everything resolved and built, before the first step. identity: what a resumed run must share."""

    config: RunConfig
    dataset: Dataset
    built: Built
    identity: str

    @property
    def precision(self) -> Precision:
        """Resolved, as everything is."""
        return cast("Precision", self.config.precision)


class Result(NamedTuple):
    """run: the run folder. test_top1: a fraction, or None without a test split. metrics: of the test split,
    else of the validation split, named in `split`; empty without either."""

    run: Path
    test_top1: float | None
    metrics: dict[str, Any]


def to_result(run: Path, metrics: dict[str, Any]) -> Result:
    """`test_top1` is that of a test split, never of another."""
    return Result(run, metrics["top1"] if metrics.get("split") == "test" else None, metrics)


def prepare(
    config: RunConfig,
    runtime: Runtime,
    *,
    classes: tuple[str, ...] | None = None,
    quiet: bool = True,
) -> Prepared:
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
    room = runtime.share(room_in_memory()) if train.images.from_files else 0
    config = resolve_data(config, images=count, side=side, channels=dataset.channels, room=room)
    check(config, images=count, world_size=runtime.world_size)
    dataset = _decoding(config, runtime, dataset, quiet)
    built = _build(config, dataset, pretrained=config.pretrained and fresh)
    check_built(config, built)
    if config.freeze_backbone and not config.pretrained and config.weights is None:
        say("note: --freeze-backbone keeps random weights; give --pretrained or --weights.", quiet)
    if config.weights is not None and fresh:
        say(str(load_weights(built.network, config.weights)), quiet)
    config = _settled(config, runtime, built, train, quiet)
    torch.set_num_threads(int(config.threads))
    _warn_of_lone_anchors(config, built, train, quiet)
    return Prepared(config, dataset, built, _identity(config, dataset))


def _settled(
    config: RunConfig, runtime: Runtime, built: Built, train: Split, quiet: bool
) -> RunConfig:
    """With every `auto` that depends on the network and the machine, by rule or by trial."""
    workers_given = config.workers != "auto"
    left_open = frozenset(name for name in NAMES if getattr(config, name) == "auto")
    config = resolve_training(
        config,
        images=len(train.labels),
        files=train.images.from_files and not read_whole(config),
        weights=sum(p.numel() for p in built.network.backbone.parameters()),
        layered=names_layers(built.network.backbone),
        device=runtime.device.type,
        ranks=launched().per_node,
        precision=runtime.precision,
    ).model_copy(update={"options": built.spec.options, "stem": built.spec.stem})
    views = built.objective.stages()[0].views
    config = fit_workers(config, views, given=workers_given)
    if not (config.autotune and left_open):
        return config
    trial = tuned(config, left_open, built.network, views, runtime)
    say(str(trial), quiet)
    return trial.config


def drawn(config: RunConfig, labels: NDArray[np.int64]) -> Draw:
    """How the run's epochs draw their images."""
    return drawing(
        config.sampler,
        labels,
        seed=config.seed,
        batch_size=int(config.batch_size),
        per_class=config.per_class,
        repeats=config.repeats,
    )


def _warn_of_lone_anchors(config: RunConfig, built: Built, train: Split, quiet: bool) -> None:
    if not any(stage.positives for stage in built.objective.stages()):
        return
    batch = int(config.batch_size)
    if config.sampler == "shuffle" and config.repeats == 1:
        share = expected_share(train.labels, batch)
    else:
        share = counted_share(drawn(config, train.labels)(0), train.labels, batch)
    text = warning(share, batch, config.sampler)
    if text is not None:
        say(f"warning: {text}", quiet)


def say(text: str, quiet: bool) -> None:
    """One line for a person."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def same_options(stored: RunConfig, given: RunConfig) -> None:
    """Raises ModelError when `given` would change a run that is continued."""
    old, new = stored.flat(), given.flat()
    changed = sorted(n for n in old | new if n not in FREE_ON_RESUME and old.get(n) != new.get(n))
    if changed:
        shown = ", ".join(f"{n} ({old.get(n)} -> {new.get(n)})" for n in changed)
        raise ModelError(
            f"A continued run cannot change {printable(shown)}; leave that out, or start a new run."
        )


def _load(config: RunConfig, runtime: Runtime, classes: tuple[str, ...] | None) -> Dataset:
    """The first process downloads and scans; the others wait, then read what it left."""

    def load() -> Dataset:
        return load_dataset(
            config.data,
            channels=config.channels,
            val_split=config.val_split,
            seed=config.seed,
            images_per_class=config.images_per_class,
            bad_images=config.bad_images,
            classes=classes,
            workers=max(1, os.cpu_count() or 1),
        )

    dataset = load() if runtime.is_main else None
    runtime.barrier()
    return load() if dataset is None else dataset


def _decoding(config: RunConfig, runtime: Runtime, dataset: Dataset, quiet: bool) -> Dataset:
    """The data set as `--cache` and `--decode` want it; arrays are in memory already."""
    train = dataset.splits["train"]
    if not isinstance(train.images, Files):
        return dataset
    if config.decode == "scaled":
        scaled = train._replace(images=train.images.scaled(side_of_scaled(config)))
        return dataset._replace(splits=dataset.splits | {"train": scaled})
    if config.cache not in ("ram", "disk"):
        return dataset
    where: Where = config.cache
    contents = Contents(dataset, side_in_cache(config))
    made = runtime.once_per_node(lambda: make_pack(contents, where, max(1, os.cpu_count() or 1)))
    say(str(made), quiet)
    return packed(dataset, contents, made.pack)


def _usual_side(split: Split) -> int:
    """The median short side of up to 200 evenly spread images, in pixels."""
    count = len(split.labels)
    rows = range(0, count, max(1, count // LOOKED_AT))
    return int(statistics.median(min(split.images.read(row).shape[-2:]) for row in rows))


def _build(config: RunConfig, dataset: Dataset, *, pretrained: bool) -> Built:
    torch.manual_seed(config.seed)
    stem = config.stem
    if stem == "auto" and config.weights is not None:
        stem = _stem_of(config.weights)
    spec = ModelSpec(
        model=config.model,
        model_options=config.model_options,
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


def _stem_of(weights: Path) -> Literal["default", "small"]:
    """Weights fit the stem that their model was made with; a nearkin run says which, others have the default."""
    run = weights if weights.is_dir() else weights.parent
    if weights in (run, run / WEIGHTS) and (run / DESCRIPTION).is_file():
        return "small" if read_description(run).spec.stem == "small" else "default"
    return "default"


def _identity(config: RunConfig, dataset: Dataset) -> str:
    fixed = {k: v for k, v in config.flat().items() if k not in FREE_ON_RESUME | {"out"}}
    text = json.dumps([fixed, dataset.classes, dataset.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
