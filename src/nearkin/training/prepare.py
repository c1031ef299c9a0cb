"""What happens before the first step: load the data, resolve the settings, build the network, check that all fits."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin.config import FREE_ON_RESUME, RunConfig, validate
from nearkin.data.cache import Contents, Where, make_pack, packed, room_in_memory
from nearkin.data.dataset import Dataset, Split, load_dataset
from nearkin.data.images import Files
from nearkin.data.sampling import Draw, drawing
from nearkin.distributed import Runtime, launched
from nearkin.errors import NearkinError
from nearkin.evaluation.model import (
    DESCRIPTION,
    WEIGHTS,
    Built,
    ModelSpec,
    build,
    read_description,
)
from nearkin.network import default_memory_format, load_weights, prefers_adamw
from nearkin.objectives import Objective, get
from nearkin.settings import DataSettings, Settings
from nearkin.training.autotune import NAMES, tune
from nearkin.training.checks import (
    check_built,
    counted_share,
    expected_share,
    missing_positives_warning,
)
from nearkin.training.console import say
from nearkin.training.defaults import (
    DataFacts,
    NetworkFacts,
    check,
    read_whole,
    resolve,
    resolve_data,
    side_in_cache,
    side_of_scaled,
)
from nearkin.training.optim import names_layers

LOOKED_AT = 200  # images whose size is read to find the usual one


class Prepared(NamedTuple):
    """Everything resolved and built, before the first step.

    identity: SHA-256 of what a resumed run must have in common with the run it continues: `settings`, `classes` and
    `data` (names, sizes and classes of the images, wherever they are).
    """

    settings: Settings
    dataset: Dataset
    built: Built
    identity: dict[str, str]


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
    options = validated_options(config)
    dataset = _load(config, runtime, classes)
    for note in dataset.notes:
        say(f"note: {note}", quiet)
    train = dataset.splits["train"]
    count = len(train.labels)
    side = _usual_side(train) if config.image_size == "auto" else 0
    room = runtime.share(room_in_memory()) if train.images.from_files else 0
    data = resolve_data(config, DataFacts(count, side, dataset.channels, room))
    check(data, images=count, world_size=runtime.world_size)
    dataset = _decoding(data, runtime, dataset, quiet)
    pretrained, device = config.pretrained and fresh, runtime.device.type
    built = _build(data, options, dataset, device, pretrained=pretrained)
    files = train.images.from_files and not read_whole(data)
    settings = resolve(data, network_facts(data, built, runtime, images=count, files=files))
    check_built(settings, built)
    if config.freeze_backbone and not config.pretrained and config.weights is None:
        say("note: --freeze-backbone keeps random weights; give --pretrained or --weights.", quiet)
    if config.weights is not None and fresh:
        say(str(load_weights(built.network, config.weights)), quiet)
    settings = _autotuned(settings, config, built, runtime, quiet)
    torch.set_num_threads(settings.threads)
    _warn_of_missing_positives(settings, built, train, quiet)
    return Prepared(settings, dataset, built, _identity(settings, dataset))


def validated_options(config: RunConfig) -> Objective.Config:
    """The options of the objective, before anything is loaded. Raises ConfigError."""
    kind = get(config.objective).Config
    return cast("Objective.Config", validate(kind, config.options, prefix="objective."))


def network_facts(
    config: DataSettings, built: Built, runtime: Runtime, *, images: int, files: bool
) -> NetworkFacts:
    """The facts of network, runtime and machine. images, files: as in `NetworkFacts`."""
    backbone, device = built.network.backbone, runtime.device.type
    return NetworkFacts(
        images=images,
        parameters=sum(p.numel() for p in backbone.parameters()),
        layered=names_layers(backbone),
        prefers_adamw=prefers_adamw(backbone),
        memory_format=default_memory_format(backbone, device, config.image_size),
        stem="small" if built.spec.stem == "small" else "default",
        options=built.spec.options,
        device=device,
        precision=runtime.precision,
        ranks=launched().per_node,
        cores=os.cpu_count() or 1,
        files=files,
    )


def _autotuned(
    settings: Settings, config: RunConfig, built: Built, runtime: Runtime, quiet: bool
) -> Settings:
    """With `--autotune`: the settings that a timed trial chooses for what `config` leaves to `auto`."""
    automatic = frozenset(name for name in NAMES if getattr(config, name) == "auto")
    if not (settings.autotune and automatic):
        return settings
    views = built.objective.stages()[0].views
    trial = tune(settings, automatic, built.network, views, runtime)
    say(str(trial), quiet)
    return trial.settings


def draw_of(config: Settings, labels: NDArray[np.int64]) -> Draw:
    """How the run's epochs draw their images."""
    return drawing(
        config.sampler,
        labels,
        seed=config.seed,
        batch_size=config.batch_size,
        per_class=config.per_class,
        repeats=config.repeats,
    )


def _warn_of_missing_positives(config: Settings, built: Built, train: Split, quiet: bool) -> None:
    if not any(stage.positives for stage in built.objective.stages()):
        return
    batch = config.batch_size
    if config.sampler == "shuffle" and config.repeats == 1:
        share = expected_share(train.labels, batch)
    else:
        share = counted_share(draw_of(config, train.labels)(0), train.labels, batch)
    text = missing_positives_warning(share, batch, config.sampler)
    if text is not None:
        say(f"warning: {text}", quiet)


def _load(config: RunConfig, runtime: Runtime, classes: tuple[str, ...] | None) -> Dataset:
    """The first process downloads and scans; the others learn how that went, then read what it left."""

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

    dataset: Dataset | None = None
    problem: NearkinError | None = None
    if runtime.is_main:
        try:
            dataset = load()
        except NearkinError as error:
            problem = error
    problem, *_ = runtime.collect_patiently(problem)
    if problem is not None:
        raise problem
    return load() if dataset is None else dataset


def _decoding(config: DataSettings, runtime: Runtime, dataset: Dataset, quiet: bool) -> Dataset:
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


def _build(
    config: DataSettings,
    options: Objective.Config,
    dataset: Dataset,
    device: str,
    *,
    pretrained: bool,
) -> Built:
    torch.manual_seed(config.seed)
    stem = config.stem
    if stem == "auto" and config.weights is not None:
        stem = _stem_of(config.weights)
    spec = ModelSpec(
        model=config.model,
        model_options=config.model_options,
        channels=config.channels,
        image_size=config.image_size,
        stem=stem,
        drop_rate=config.drop_rate,
        drop_path=config.drop_path,
        objective=config.objective,
        options=config.options,
        classes=dataset.classes,
    )
    return build(
        spec,
        options=options,
        pretrained=pretrained,
        images=len(dataset.splits["train"].labels),
        batch_size=config.batch_size,
        device=device,
    )


def _stem_of(weights: Path) -> Literal["default", "small"]:
    """Weights fit the stem that their model was made with; a nearkin run says which, others have the default."""
    run = weights if weights.is_dir() else weights.parent
    if weights in (run, run / WEIGHTS) and (run / DESCRIPTION).is_file():
        return "small" if read_description(run).spec.stem == "small" else "default"
    return "default"


def _identity(settings: Settings, dataset: Dataset) -> dict[str, str]:
    free = FREE_ON_RESUME | {"data", "out"}
    fixed = {name: v for name, v in settings.flat().items() if name not in free}
    return {
        "settings": _digest(fixed),
        "classes": _digest(dataset.classes),
        "data": dataset.fingerprint,
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
