"""The options of a run as they are given: frozen, validated, the same in YAML and on the command line. No torch.

Options travel flat, `{"epochs": 30, "objective": "cone", "objective.topk": 512}`, until `RunConfig` checks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nearkin.catalogue import known_loggers
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.hints import unknown_option, value_hint
from nearkin.yaml_files import load_yaml

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
LARGEST = 1 << 14  # of a model option; above every width and depth in use
LONGEST = 16  # numbers in a list
MOST = 32  # options
RESERVED = Path(__file__).with_name("reserved.yaml")


def checked_model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with command-line words turned into values.

    Values are finite numbers, true, false, and lists of up to 16 of them, so that none can name a file, class or
    address. Names in reserved.yaml are refused. Whether a model takes an option is checked when it is built.

    Raises ConfigError that names the option.
    """
    if len(options) > MOST:
        raise ConfigError(f"More than {MOST} options --model.NAME; give fewer.")
    return {_name(name): _value(name, value) for name, value in options.items()}


ModelOptions = Annotated[dict[str, Any], AfterValidator(checked_model_options)]


@cache
def reserved() -> dict[str, str | None]:
    """Names that no model option can have, each with the option to use instead."""
    names: dict[str, str | None] = yaml.safe_load(RESERVED.read_text(encoding="utf-8"))
    return names


def _name(name: str) -> str:
    if name in reserved() or name.startswith("pretrained"):
        instead = reserved().get(name)
        advice = f"use {instead}" if instead else "leave it out"
        raise ConfigError(f"--model.{name} cannot be set; {advice}.")
    if not NAME.fullmatch(name):
        raise ConfigError(f"--model.{printable(name)[:80]} is no name of an option of a model.")
    return name


def _value(name: str, value: Any) -> Any:
    value = _parsed(value) if isinstance(value, str) else value
    if isinstance(value, list | tuple):
        if 0 < len(value) <= LONGEST and all(_is_number(v) for v in value):
            return list(value)
    elif _is_number(value):
        return value
    shown = printable(str(value)[:80])
    raise ConfigError(
        f"--model.{name} {shown!r} is not valid: give a number up to {LARGEST}, true, false, "
        f"or a list of up to {LONGEST} of them."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST  # false for nan


def _parsed(word: str) -> Any:
    """A word of the command line as YAML reads it; also numbers like 1e-3, which YAML reads as strings."""
    if len(word) > 200:
        return word
    try:
        value = yaml.safe_load(word)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError, ValueError):
        return word


Logs = Annotated[str | None, AfterValidator(known_loggers)]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]
Magnitude = Annotated[int, Field(ge=0, le=30)]
LEAST_SIDE = 4
Side = Annotated[int, Field(ge=LEAST_SIDE, le=4096)]
# `auto` in an objective's options lasts until `Objective.Config.resolve`; type checkers see the type after that.
if TYPE_CHECKING:
    AutoCount = int
    AutoNatural = int
    AutoAmount = float
    AutoPart = float
    AutoShare = float
    AutoViews = int
else:
    AutoCount = Count | Auto
    AutoNatural = Natural | Auto
    AutoAmount = Amount | Auto
    AutoPart = Annotated[float, Field(ge=0, le=1)] | Auto
    AutoShare = Share | Auto
    AutoViews = Annotated[int, Field(ge=1, le=8)] | Auto
FREE = {"objective": "options", "model": "model_options"}  # `objective.NAME` -> the field it is in
SCRATCH_OBJECTIVE = "cone"  # what `--objective auto` is from scratch; photos: training/defaults.py
CONFIG_FILE = "config.yaml"  # in every run folder
# What a resumed run may change: nothing that touches the weights.
FREE_ON_RESUME = frozenset({"check", "workers", "log", "log_level", "log_every", "save_minutes"})
GIVEN_FILE = "given.yaml"  # beside it: the options as they were given


def option(default: Any, description: str, **limits: Any) -> Any:
    """A field of an options model: `--help` and the docs show its description, pydantic checks its limits."""
    if isinstance(default, float):
        limits = {"allow_inf_nan": False} | limits
    return Field(default, description=description, **limits)


class RunConfig(BaseModel):
    """Every option of a run. `auto` is resolved before training: see `Settings` and docs/defaults.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Data, objective and length.
    data: str = option("digits", "built-in name, folder of class folders, or CSV/parquet table")
    objective: str = option("auto", "loss to minimise (nearkin list objectives)")
    options: dict[str, Any] = option({}, "options of the objective, as --objective.NAME")
    seed: Seed = option(0, "seed of data order, augmentation, initialisation")
    epochs: Natural | Auto = option(
        "auto", "passes over the training images, at most; 0 stops after the probe"
    )
    minutes: Amount | Auto = option(
        "auto", "end within so many minutes by fewer epochs or blocks; 0 = no limit"
    )
    batch_size: Count | Auto = option("auto", "images per step, over all processes")
    accumulate: Count = option(1, "parts the batch is split into to save memory")
    batchnorm_by_parts: bool = option(
        False, "let BatchNorm see one part at a time, which changes the gradient"
    )

    # The network.
    model: str = option("auto", "any timm model (nearkin list models)")
    model_options: ModelOptions = option({}, "options of the timm model, as --model.NAME")
    pretrained: bool = option(
        False, "start from pretrained weights (auto for --model auto on photos)"
    )
    from_scratch: bool = option(False, "start from random weights, on photos too")
    weights: Path | None = option(None, "start from the weights in this file or run folder")
    probe: bool | Auto = option(
        "auto", "start the classifier from a logistic regression on the frozen features"
    )
    probe_images: Count | Auto = option(
        "auto", "training images that it reads, at most; as many of each class"
    )
    refit: bool = option(
        False, "fit the classifier anew to the final features; keep it if validation is better"
    )
    blocks: Natural | Literal["auto", "all"] = option(
        "auto", "last blocks of the backbone that learn; those before them stay as they are"
    )
    image_size: Side | Auto = option("auto", "side of the square input, in pixels")
    channels: Count | Auto = option("auto", "colour channels: 1 or 3 for image files")
    stem: Literal["auto", "default", "small"] = option("auto", "first layers for small images")
    drop_rate: Share = option(0.0, "dropout of the pooled features")
    drop_path: Share = option(0.0, "stochastic depth of the backbone")
    freeze_batchnorm: bool | Auto = option(
        "auto", "BatchNorm of the backbone keeps its statistics (auto if pretrained)"
    )
    freeze_backbone: bool = option(False, "train the heads only")

    # The data.
    val_split: Share = option(0.1, "share of train held out where no split exists")
    split_seed: Seed | None = option(None, "seed of that split; by default the seed of the run")
    images_per_class: Count | None = option(None, "at most so many training images a class")
    bad_images: Literal["error", "skip"] = option(
        "error", "unreadable images stop the run, or are left out"
    )
    check: Literal["auto", "full", "headers"] = option(
        "auto", "look at new image files: decode them, or headers only (auto: above 100 000)"
    )
    augment: Literal["auto", "none", "light", "medium", "strong"] = option("auto", "strength")
    crop_scale: Fraction | Literal["auto", "padded", "centre"] = option(
        "auto", "least share of the area in a random crop"
    )
    randaugment: Magnitude | Auto = option(
        "auto", "magnitude of RandAugment (2 operations), 0 = off"
    )
    jitter: Annotated[float, Field(ge=0, le=2)] | Auto = option(
        "auto", "brightness, contrast and saturation; hue a quarter of it; 0 = off"
    )
    jitter_prob: Probability | Auto = option("auto", "share of images whose colours change")
    grey_prob: Probability | Auto = option("auto", "share of images that become grey")
    erasing: Probability | Auto = option("auto", "share of images that lose a rectangle")
    flip: bool | Auto = option("auto", "mirror training images (never auto on digits)")
    mixup: Amount | Auto = option("auto", "Beta parameter of mixup, 0 = off")
    cutmix: Amount | Auto = option("auto", "Beta parameter of CutMix, 0 = off")
    eval_size: Side | Auto = option("auto", "side of the input in validation and test")
    eval_crop: Annotated[float, Field(ge=0.1, le=1)] | Auto = option(
        "auto", "share of the short side that the centre crop keeps there"
    )
    sampler: Literal["auto", "shuffle", "balanced", "weighted"] = option(
        "auto", "every image once; groups of a class; or classes equally often"
    )
    per_class: Count = option(4, "images in a group of the balanced sampler")
    repeats: Count = option(1, "crops of an image in one batch, of fewer images per epoch")
    class_weights: Literal["none", "balanced"] = option("none", "weigh cross-entropy by class")
    cache: Literal["auto", "off", "ram", "disk"] = option(
        "auto", "keep decoded and shrunken images, in memory or in a file that stays"
    )
    decode: Literal["full", "scaled"] = option(
        "full", "scaled: large JPEGs for training at a fraction of their size, which changes pixels"
    )
    workers: Natural | Auto = option("auto", "processes that load images, per rank")

    # The optimiser.
    optimizer: Literal["auto", "sgd", "adamw", "lamb"] = option(
        "auto", "torch's SGD or AdamW, or LAMB"
    )
    lr: Amount | Auto = option("auto", "peak learning rate")
    head_lr: Positive | Auto = option("auto", "learning rate of the heads / of the backbone")
    min_lr_ratio: Amount = option(1e-3, "final learning rate / peak", le=1)
    warmup_epochs: Amount | Auto = option("auto", "linear warm-up, in epochs")
    weight_decay: Amount | Auto = option("auto", "decay of weights")
    decay_all: bool = option(False, "decay norms and biases as well")
    momentum: Share = option(0.9, "momentum of SGD")
    nesterov: bool = option(True, "Nesterov's momentum for SGD")
    layer_decay: Fraction | Auto = option(
        "auto", "learning rate of each layer / of the layer above"
    )
    clip_grad: Positive | None = option(None, "largest norm of the gradient; lamb has 1 without it")
    ema: Share = option(0.0, "momentum of an averaged copy that is evaluated and saved, 0 = off")

    # The machine.
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = option("auto", "of the network")
    memory_format: Literal["auto", "contiguous", "channels_last"] = option("auto", "of images")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    threads: Count | Auto = option("auto", "CPU threads of each process")
    autotune: bool = option(False, "choose precision, memory format and threads by a short trial")
    compile: bool = option(False, "compile the backbone (torch.compile)")

    # The record.
    out: Path | None = option(
        None,
        "run folder (must not exist); default runs/DATA-DATE, with --objective runs/DATA-OBJECTIVE-DATE",
    )
    log: Logs = option(
        None, "log to tensorboard, wandb, mlflow as well; several with commas, or once each"
    )
    log_every: Count = option(10, "steps between records in metrics.jsonl")
    save_minutes: Positive = option(5.0, "minutes between checkpoints")
    log_level: Literal["info", "warning", "error"] = option("info", "least text on stderr")

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        """Gather `objective.NAME` and `model.NAME` keys into their fields."""
        if not isinstance(values, Mapping):
            return values
        nested: dict[str, Any] = dict(values)
        for key in values:
            room, dot, name = str(key).partition(".")
            if dot and room in FREE:
                nested[FREE[room]] = {**(nested.get(FREE[room]) or {}), name: nested.pop(key)}
        return nested

    def flat(self, *, given: bool = False) -> dict[str, Any]:
        """The options as YAML stores them: plain values, with `objective.NAME` and `model.NAME`.

        given: only those that are not left to their defaults.
        """
        values = self.model_dump(mode="json", exclude=set(FREE.values()), exclude_unset=given)
        free = {f"{room}.{k}": v for room, f in FREE.items() for k, v in getattr(self, f).items()}
        return values | free


Options = TypeVar("Options", bound=RunConfig)


class EpisodeOptions(BaseModel):
    """What an episode is, how many there are, and where they are computed. Source of the defaults: SCHaNe's code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: Annotated[int, Field(ge=2)] = option(5, "classes in an episode")
    shots: Count = option(1, "labelled images of each class")
    queries: Count = option(15, "images of each class to classify")
    episodes: Annotated[int, Field(ge=2)] = option(3000, "episodes to average")
    copies: Natural = option(5, "augmented copies of a labelled image; 0 = the image itself, once")
    split: str | None = option(None, "train, val or test; default test, else val, else all")
    seed: Seed = option(0, "seed of episodes and copies")
    bad_images: Literal["error", "skip"] | None = option(
        None, "unreadable images stop or go; default error, for RUN's own data as in its training"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute features")
    workers: Natural = option(0, "processes that load images")

    @property
    def needed(self) -> int:
        """Images that a class must have: those of its support and its queries."""
        return self.shots + self.queries


class CompareOptions(BaseModel):
    """What is compared, on which terms, and where it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objectives: str = option(
        "ce,supcon,cone",
        "NAME[+ls|+ema][:OPTION=VALUE]..., separated by commas; ce is always there",
    )
    seeds: Count = option(
        5, "runs of each, at seeds from --seed on; fewer than three give no verdict"
    )
    budget: Literal["crops", "minutes"] = option(
        "crops", "what is equal: crops of images that train the network, or --minutes"
    )
    tune: Natural = option(0, "trials to choose the options of each, on validation (needs Optuna)")
    jobs: Count | Auto = option(
        "auto", "runs at a time; auto: one for each GPU, without one for each core"
    )
    submit: Literal["no", "slurm", "ray"] = option(
        "no", "a SLURM array or Ray tasks instead of processes on this machine"
    )
    pick: bool = option(False, "train the winner on validation once more, on train and validation")


def validate(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Any:
    """`model(**values)`, or one ConfigError that names the option, what is wrong with it, and what is allowed. The word
    `none` is None for an option that may be None, so that a command line can undo a file."""
    fields = model.model_fields.items()
    optional = [name for name, field in fields if type(None) in get_args(field.annotation)]
    none = {name: None for name in optional if values.get(name) == "none"}
    try:
        return model.model_validate(dict(values) | none)
    except ValidationError as error:
        raise ConfigError(_sentence(error, model, values, prefix)) from None


def _sentence(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any], prefix: str
) -> str:
    # A union reports one problem per member; the first that is no "should be 'auto'" says the most.
    problems = sorted(error.errors(), key=lambda p: p["type"] == "literal_error")
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    same = [p for p in problems if p["loc"] and str(p["loc"][0]) == name]
    option = f"--{prefix}{name.replace('_', '-')}"
    if problems[0]["type"] == "extra_forbidden":
        return str(unknown_option(option, model.model_fields, prefix=f"--{prefix}"))
    wanted = " or ".join(dict.fromkeys(_wanted(p) for p in same))
    value = str(values.get(name))
    allowed = re.findall("'([^']+)'", " ".join(str(p.get("ctx", {}).get("expected")) for p in same))
    shown, hint = printable(option), value_hint(name, value, allowed)
    return f"{shown} {printable(value)!r} is not valid: {wanted}.{hint}"


def _wanted(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat options of a YAML file. Raises ConfigError when it is missing, too large or no mapping."""
    loaded: Any = load_yaml(path)
    shown = printable(str(path))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{shown} holds no options; write lines like `epochs: 30`.")
    flat: dict[str, Any] = {}
    for name, value in _named(loaded):
        if name in flat:
            raise ConfigError(f"{shown} gives {printable(name)} twice; give it once.")
        flat[name] = value
    return flat


def stored(model: type[Options], path: Path) -> Options:
    """The options in a file of a run folder. Raises ModelError when it is missing or damaged."""
    try:
        options: Options = validate(model, read_yaml(path))
    except ConfigError as error:
        what = "is damaged" if path.exists() else "is missing, copy it from the run"
        raise ModelError(f"{printable(str(path))} {what}: {error}") from None
    return options


def _named(loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The names with underscores, and `objective: {name: NAME, OPTION: VALUE}` as flat options."""
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name == "objective" and isinstance(value, dict):
            yield name, value.get("name", "auto")
            own = {k: v for k, v in value.items() if k != "name"}
            yield from ((f"{name}.{k}".replace("-", "_"), v) for k, v in own.items())
        else:  # YAML reads `cache: off` as False
            yield name, "off" if name == "cache" and value is False else value


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win. A layer that names another objective or model drops the options of the earlier one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for room in FREE:
            earlier = merged.get(room, "auto")  # options without a name belong to a later one
            if earlier != "auto" and layer.get(room, earlier) != earlier:
                merged = {k: v for k, v in merged.items() if not k.startswith(f"{room}.")}
        merged |= layer
    return merged


def to_yaml(config: RunConfig, *, given: bool = False) -> str:
    """The options as a YAML file that `--config` reads back to the same configuration. given: as in `flat`."""
    flat = config.flat(given=given)
    values = {k: v for k, v in flat.items() if not k.startswith("objective.")}
    values["objective"] = {"name": config.objective} | config.options
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
