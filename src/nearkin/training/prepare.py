"""A job: data loaded, every `auto` resolved, network and objective built, everything checked to fit."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin.config import FREE_ON_RESUME, RunConfig
from nearkin.data.cache import Contents, Where, make_pack, packed, room_in_memory
from nearkin.data.dataset import Chosen, Dataset, Split, choose, leave_out, looked, to_dataset
from nearkin.data.images import Files
from nearkin.data.look import Ranks, usual_side
from nearkin.data.sampling import Draw, drawing
from nearkin.data.sources.resolve import resolve
from nearkin.distributed import Precision, Runtime, launched
from nearkin.errors import ModelError, NearkinError, printable
from nearkin.evaluation.model import (
    DESCRIPTION,
    WEIGHTS,
    Built,
    ModelSpec,
    build,
    read_description,
)
from nearkin.network import load_weights
from nearkin.training.autotune import NAMES, tuned
from nearkin.training.checks import check_built, counted_share, expected_share, warning
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
    look: bool = True,
) -> Prepared:
    """Everything that can fail before the first step. classes: of the run that is continued, if one is. look: whether
    image files are looked at and a cache is built.

    Raises ConfigError, DataError or ModelError; writes nothing.
    """
    quiet = quiet or not runtime.is_main
    fresh = classes is None
    chosen = _load(config, runtime)
    dataset = to_dataset(chosen, classes)
    train = dataset.splits["train"]
    side = usual_side(train.images) if config.image_size == "auto" else 0
    room = runtime.share(room_in_memory()) if train.images.from_files else 0
    given, config = config, _from_data(config, dataset, side, room, runtime)
    if look:
        dataset = _decoding(config, runtime, chosen, classes, quiet)
        if len(dataset.splits["train"].labels) < len(train.labels):
            kept = given.model_copy(update={"cache": config.cache})
            config = _from_data(kept, dataset, side, room, runtime)
        train = dataset.splits["train"]
    for note in dataset.notes:
        say(f"note: {note}", quiet)
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
    left_open = frozenset(name for name in NAMES if getattr(config, name) == "auto")
    config = resolve_training(
        config,
        images=len(train.labels),
        files=train.images.from_files and not read_whole(config),
        backbone=built.network.backbone,
        weights=sum(p.numel() for p in built.network.backbone.parameters()),
        layered=names_layers(built.network.backbone),
        device=runtime.device.type,
        ranks=launched().per_node,
        precision=runtime.precision,
    ).model_copy(update={"options": built.spec.options, "stem": built.spec.stem})
    if not (config.autotune and left_open):
        return config
    views = built.objective.stages()[0].views
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


def _load(config: RunConfig, runtime: Runtime) -> Chosen:
    """The images to use. The first process goes ahead, since it may have to download them."""

    def load() -> Chosen:
        return choose(
            resolve(config.data),
            channels=config.channels,
            val_split=config.val_split,
            seed=config.seed,
            images_per_class=config.images_per_class,
        )

    chosen: Chosen | None = None
    problem: NearkinError | None = None
    if runtime.is_main:
        try:
            chosen = load()
        except NearkinError as error:
            problem = error
    problem, *_ = runtime.collect_patiently(problem)
    if problem is not None:
        raise problem
    return load() if chosen is None else chosen


def _from_data(
    config: RunConfig, dataset: Dataset, side: int, room: int, runtime: Runtime
) -> RunConfig:
    """With everything that follows from the training images."""
    count = len(dataset.splits["train"].labels)
    config = resolve_data(config, images=count, side=side, channels=dataset.channels, room=room)
    check(config, images=count, world_size=runtime.world_size)
    return config


def _decoding(
    config: RunConfig,
    runtime: Runtime,
    chosen: Chosen,
    classes: tuple[str, ...] | None,
    quiet: bool,
) -> Dataset:
    """The data set without unreadable images, as `--cache` and `--decode` want it; arrays are in memory already.

    Building a cache decodes all images, so nothing else looks at them before.
    """
    files = chosen.files
    if files and config.cache in ("ram", "disk"):
        where: Where = config.cache
        contents = Contents(files, side_in_cache(config))
        cores = max(1, os.cpu_count() or 1)
        made = runtime.once_per_node(lambda: make_pack(contents, where, cores))
        say(str(made), quiet)
        bad = contents.bad_rows(files, made)
        readable = leave_out(chosen, bad, config.bad_images)
        return packed(to_dataset(readable, classes), contents, made.pack)
    ranks = Ranks.on_node(runtime.rank, launched().per_node, runtime.collect_patiently)
    readable = looked(chosen, config.check, config.bad_images, ranks=ranks, quiet=quiet)
    dataset = to_dataset(readable, classes)
    train = dataset.splits["train"]
    if config.decode == "scaled" and isinstance(train.images, Files):
        scaled = train._replace(images=train.images.scaled(side_of_scaled(config)))
        return dataset._replace(splits=dataset.splits | {"train": scaled})
    return dataset


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
