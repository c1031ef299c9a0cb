"""What happens before the first step: load the data, resolve the settings, build the network, check that all fits."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from nearkin.config import FREE_ON_RESUME, RunConfig, validate
from nearkin.data.cache import Contents, Where, make_pack, packed, room_in_memory
from nearkin.data.dataset import Dataset, Split, choose, leave_out, looked, numbered
from nearkin.data.images import Files
from nearkin.data.look import Ranks, usual_side
from nearkin.data.sources.listing import Listing
from nearkin.data.sources.resolve import resolve as list_data
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, printable
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.model import DESCRIPTION, WEIGHTS, Built, ModelSpec, build, read_description
from nearkin.network import (
    PACKAGED,
    count_layers,
    default_memory_format,
    load_weights,
    prefers_adamw,
)
from nearkin.objectives import Objective, get
from nearkin.process import cores, launched
from nearkin.settings import DataSettings, Settings
from nearkin.training import checks, defaults
from nearkin.training.autotune import NAMES, tune
from nearkin.training.batches import draw_of
from nearkin.training.console import say
from nearkin.training.plan import fix_parts, plan, probe_images
from nearkin.training.probe import readable, start_from_probe


class Prepared(NamedTuple):
    """Everything resolved and built, before the first step.

    built: on the device. evaluator: of the run's splits. identity: SHA-256 of what a resumed run must have in common
    with the run it continues: `settings`, `classes` and `data` (names, sizes and classes of the images, wherever they
    are).
    """

    settings: Settings
    dataset: Dataset
    built: Built
    evaluator: Evaluator
    identity: dict[str, str]


def prepare(
    config: RunConfig,
    runtime: Runtime,
    *,
    listing: Listing | None = None,
    classes: tuple[str, ...] | None = None,
    begun: bool = False,
    look: bool = True,
    quiet: bool = True,
    started: float | None = None,
) -> Prepared:
    """Everything that can fail before the first step. listing: of `config.data`, where it is made already. classes: of
    the run that is continued, if one is. begun: whether it has a checkpoint, which replaces all first weights. look:
    whether image files are looked at, a cache is built and, in a new run, the probe is fitted. started: when the run
    was, by `time.monotonic`.

    Raises ConfigError, DataError or ModelError; writes nothing but caches.
    """
    started = time.monotonic() if started is None else started
    silent = quiet or not runtime.is_main or config.log_level == "error"
    quiet = silent or config.log_level != "info"
    config = _with_model_of_weights(config)
    if config.objective != "auto":
        validated_options(config)  # what is wrong with them is said before images are looked at
    data, dataset = _read_data(config, runtime, listing, classes, look=look, quiet=quiet)
    train = dataset.splits["train"]
    # A run that goes on may have fewer workers than it began with; its stored settings have no `auto`.
    fixed = config.workers != "auto" and classes is None
    settings, built = _resolve(data, dataset, runtime, load=not begun, workers_given=fixed)
    _say_doubts(settings, config, built, quiet)
    if settings.weights is not None and not begun:
        settings = _with_weights(settings, built, config, quiet)
    settings = _tuned(settings, config, built, runtime, quiet)
    evaluator = _placed(settings, built, runtime)
    if look and settings.probe and not begun:
        chosen = config.probe_images == "auto"
        settings = _probe(settings, built, dataset, evaluator, runtime, chosen=chosen, quiet=quiet)
    if look and settings.minutes > 0 and settings.epochs > 0:
        at, spent = runtime.at(settings.precision), time.monotonic() - started
        planned = plan(settings, built, dataset, evaluator, at, config=config, spent=spent)
        say(str(planned), quiet)
        settings = planned.settings
    fix_parts(built.network, settings)
    automatic = config.sampler == "auto"
    if warning := missing_positives(settings, built, train, automatic=automatic):
        say(f"warning: {warning}", silent)
    return Prepared(settings, dataset, built, evaluator, _identity(settings, dataset))


def _say_doubts(settings: Settings, config: RunConfig, built: Built, quiet: bool) -> None:
    """Where random weights are probably not meant, and of what went wrong elsewhere."""
    if settings.compile and settings.device == "cuda":
        text = "lost accuracy in its one trial on a GPU (docs/performance.md); compare a short run without it"
        say(f"warning: --compile {text}.", quiet)
    keeping = {
        "--freeze-backbone": settings.freeze_backbone,
        f"--blocks {settings.blocks}": settings.blocks != "all",
        "--epochs 0": settings.epochs == 0,
    }
    for option, kept in keeping.items():
        if kept and not (settings.pretrained or settings.weights):
            say(f"note: {option} keeps random weights; give --pretrained or --weights.", quiet)
    if defaults.named_from_scratch(config, settings):
        text = "starts from random weights, which takes many images and hours; --pretrained takes timm's weights"
        say(f"note: {settings.model} {text}, --from-scratch leaves this note out.", quiet)
    if checks.idle_contrast(settings, built):
        text = "keeps the features as they are, and nothing else learns from their contrast"
        say(f"note: --freeze-backbone {text}; --objective ce is the same.", quiet)
    for names, reason in checks.without_effect(settings, config):
        say(f"note: nothing reads {names} {reason}.", quiet)


def _tuned(
    settings: Settings, config: RunConfig, built: Built, runtime: Runtime, quiet: bool
) -> Settings:
    """With what `--autotune` measures, where that was left to it."""
    automatic = frozenset(name for name in NAMES if getattr(config, name) == "auto")
    if not (settings.autotune and automatic):
        return settings
    views = built.objective.stages()[0].views
    trial = tune(settings, automatic, built.network, views, runtime)
    say(str(trial), quiet)
    return trial.settings


def _probe(
    settings: Settings,
    built: Built,
    dataset: Dataset,
    evaluator: Evaluator,
    runtime: Runtime,
    *,
    chosen: bool,
    quiet: bool,
) -> Settings:
    """Fit the probe; say what it starts from, and what it reaches. chosen: whether the number of its images is found
    here. Returns the settings with it."""
    say(f"{settings.model}, {origin(settings)}; a probe of its features comes first", quiet)
    if chosen:
        most = probe_images(settings, built, dataset, evaluator, runtime)
        settings = settings.model_copy(update={"probe_images": most})
    found = start_from_probe(built, dataset, evaluator, runtime, most=settings.probe_images)
    reached = "fitted" if found.top1 is None else f"val top-1 {100 * found.top1:.2f} %"
    then = f"; fine-tuning within {settings.minutes:g} min" if settings.minutes > 0 else ""
    say(f"probe of the frozen features: {reached}{then if settings.epochs > 0 else ''}", quiet)
    return settings


def origin(settings: Settings) -> str:
    """Where the first weights of the backbone come from."""
    if settings.weights is not None:
        return f"from {printable(str(settings.weights))}"
    if not settings.pretrained:
        return "from scratch"
    package = PACKAGED.get(settings.model)
    if package is not None:
        return f"pretrained on ImageNet (package {package.distribution})"
    return "pretrained (timm's weights)"


def _resolve(
    data: DataSettings,
    dataset: Dataset,
    runtime: Runtime,
    *,
    load: bool,
    workers_given: bool,
) -> tuple[Settings, Built]:
    """The network, and the settings that follow from it. load: whether pretrained weights are loaded. workers_given:
    whether their number must not be lowered."""
    images = dataset.splits["train"].images
    built = _build(data, dataset, runtime.device.type, load=load and data.pretrained)
    files = images.from_files and not defaults.read_whole(data)
    facts = network_facts(data, built, runtime, images=len(images), files=files)
    settings = defaults.resolve(data, facts)
    checks.check_built(settings, built)
    views = built.objective.stages()[0].views
    return checks.fit_workers(settings, views, given=workers_given), built


def _with_weights(settings: Settings, built: Built, config: RunConfig, quiet: bool) -> Settings:
    """Load the weights that are given. BatchNorm of a backbone with new layers must learn its statistics."""
    assert settings.weights is not None
    source, network = _source(settings.weights), built.network
    foreign: tuple[str, ...] = ()
    if source is not None and source.classes != built.spec.classes and network.classifies:
        foreign = (f"heads.{network.chain('logits')[-1]}.",)
    loaded = load_weights(network, settings.weights, foreign=foreign)
    say(str(loaded), quiet)
    if config.freeze_batchnorm != "auto" or loaded.whole_backbone:
        return settings
    learning = settings.model_copy(update={"freeze_batchnorm": False})
    checks.check_built(learning, built)
    return learning


def _placed(settings: Settings, built: Built, runtime: Runtime) -> Evaluator:
    """Put network and objective on the device. Returns what evaluates them there."""
    torch.set_num_threads(settings.threads)
    if runtime.world_size > 1:
        from nearkin.network import synchronise_batchnorm

        synchronise_batchnorm(built.network, runtime.device.type)
    runtime.place(built.network)
    runtime.place(built.objective)
    built.network.set_memory_format(settings.memory_format)
    size = checks.evaluated_at_once(settings, runtime.world_size)
    return Evaluator(
        runtime, defaults.eval_spec(settings), batch_size=size, workers=settings.workers
    )


def missing_positives(
    settings: Settings, built: Built, train: Split, *, automatic: bool
) -> str | None:
    """The warning about anchors that will find no other image of their class. automatic: whether the sampler is."""
    needing = [stage for stage in built.objective.stages() if stage.positives]
    whole = all(stage.within is None for stage in needing)
    best = automatic and settings.sampler == "balanced" and whole  # there is nothing better
    if not needing or best:
        return None
    batch, draws = settings.batch_size, draw_of(settings, train.labels)(0)
    within = needing[0].within
    share = checks.share_without_positive(draws, train.labels, batch, within)
    return checks.missing_positives_warning(share, within or batch, settings.sampler)


def validated_options(config: RunConfig) -> Objective.Config:
    """The options of the objective, before anything is loaded. Raises ConfigError."""
    kind = get(config.objective).Config
    return cast("Objective.Config", validate(kind, config.options, prefix="objective."))


def network_facts(
    config: DataSettings, built: Built, runtime: Runtime, *, images: int, files: bool
) -> defaults.NetworkFacts:
    """The facts of network, runtime and machine. images, files: as in `NetworkFacts`."""
    backbone, device = built.network.backbone, runtime.device.type
    return defaults.NetworkFacts(
        images=images,
        parameters=sum(p.numel() for p in backbone.parameters()),
        layers=count_layers(backbone),
        prefers_adamw=prefers_adamw(backbone),
        memory_format=default_memory_format(backbone, device, config.image_size),
        stem="small" if built.spec.stem == "small" else "default",
        options=built.spec.options,
        probed=readable(built.objective.heads) is not None,
        positives=any(stage.positives for stage in built.objective.stages()),
        device=device,
        precision=runtime.precision,
        cores=cores(),
        files=files,
    )


def _read_data(
    config: RunConfig,
    runtime: Runtime,
    listing: Listing | None,
    classes: tuple[str, ...] | None,
    *,
    look: bool,
    quiet: bool,
) -> tuple[DataSettings, Dataset]:
    """The data set, and the settings that follow from it. Arguments as in `prepare`."""
    chosen = _load(config, runtime, listing)
    dataset = numbered(chosen, classes)
    train = dataset.splits["train"]
    side = usual_side(train.images) if config.image_size == "auto" else 0
    room = runtime.share(room_in_memory()) if train.images.from_files else 0
    data = _from_data(config, dataset, side, room, runtime)
    if look:
        dataset = _decoding(data, runtime, chosen, classes, quiet)
        if len(dataset.splits["train"].labels) < len(train.labels):
            kept = config.model_copy(update={"cache": data.cache})
            data = _from_data(kept, dataset, side, room, runtime)
    for note in dataset.notes:
        say(f"note: {note}", quiet)
    return data, dataset


def _load(config: RunConfig, runtime: Runtime, listing: Listing | None) -> Dataset:
    """The images to use. The first process goes ahead, since it may have to download them."""

    def load() -> Dataset:
        return choose(
            listing or list_data(config.data),
            channels=config.channels,
            val_split=config.val_split,
            split_seed=config.split_seed,
            seed=config.seed,
            images_per_class=config.images_per_class,
        )

    chosen = load() if runtime.is_main else None
    runtime.barrier()
    return load() if chosen is None else chosen


def _from_data(
    config: RunConfig, dataset: Dataset, side: int, room: int, runtime: Runtime
) -> DataSettings:
    """With everything that follows from the training images."""
    count = len(dataset.splits["train"].labels)
    facts = defaults.DataFacts(
        count,
        side,
        dataset.channels,
        room,
        files=dataset.splits["train"].images.from_files,
        device=runtime.device.type,
    )
    data = defaults.resolve_data(config, facts)
    defaults.check(data, images=count, world_size=runtime.world_size)
    return data


def _decoding(
    config: DataSettings,
    runtime: Runtime,
    chosen: Dataset,
    classes: tuple[str, ...] | None,
    quiet: bool,
) -> Dataset:
    """The data set without unreadable images, as `--cache` and `--decode` want it; arrays are in memory already.

    Building a cache decodes all images, so nothing else looks at them before.
    """
    files = chosen.files
    if files and config.cache != "off":
        where: Where = config.cache
        contents = Contents(files, defaults.side_in_cache(config))
        on_node = cores() * launched().per_node
        try:
            made = runtime.once_per_node(lambda: make_pack(contents, where, on_node))
        except ConfigError as error:
            if classes is None or not defaults.shrinks_exactly(config):
                raise
            # A run that goes on reads the same pixels without it.
            say(f"note: {str(error).partition(';')[0]}; the run goes on without a cache.", quiet)
        else:
            say(str(made), quiet)
            readable = leave_out(chosen, made.bad, config.bad_images)
            return packed(numbered(readable, classes), contents, made.pack)
    ranks = Ranks.on_node(runtime.rank, launched().per_node, runtime.collect)
    readable = looked(chosen, config.check, config.bad_images, ranks=ranks, quiet=quiet)
    dataset = numbered(readable, classes)
    train = dataset.splits["train"]
    if config.decode == "scaled" and isinstance(train.images, Files):
        scaled = train._replace(images=train.images.scaled(defaults.side_of_scaled(config)))
        return dataset._replace(splits=dataset.splits | {"train": scaled})
    return dataset


def _build(config: DataSettings, dataset: Dataset, device: str, *, load: bool) -> Built:
    """load: whether pretrained weights are loaded."""
    torch.manual_seed(config.seed)
    stem = config.stem
    if stem == "auto" and config.weights is not None:
        source = _source(config.weights)  # weights fit the stem that their model was made with
        stem = "small" if source is not None and source.stem == "small" else "default"
    shared = config.model_dump(include=set(ModelSpec.model_fields))
    return build(
        ModelSpec.model_validate(shared | {"stem": stem, "classes": dataset.classes}),
        options=validated_options(config),
        load_pretrained=load,
        pretrained=defaults.is_pretrained(config),
        images=len(dataset.splits["train"].labels),
        batch_size=config.batch_size,
        device=device,
    )


def _source(weights: Path | None) -> ModelSpec | None:
    """The model that `--weights` come from, where they are those of a nearkin run."""
    if weights is None:
        return None
    run = weights if weights.is_dir() else weights.parent
    described = weights in (run, run / WEIGHTS) and (run / DESCRIPTION).is_file()
    return read_description(run).spec if described else None


def _with_model_of_weights(config: RunConfig) -> RunConfig:
    """`--model auto` with the weights of a nearkin run is the model of that run."""
    source = _source(config.weights)
    if source is None or config.model != "auto":
        return config
    return config.model_copy(
        update={"model": source.model, "model_options": source.model_options | config.model_options}
    )


def _identity(settings: Settings, dataset: Dataset) -> dict[str, str]:
    free = FREE_ON_RESUME | {"data", "out"}
    fixed = {name: v for name, v in settings.flat().items() if name not in free}
    classes = _digest(dataset.classes)
    return {"settings": _digest(fixed), "classes": classes, "data": dataset.fingerprint}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
