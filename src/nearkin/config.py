"""The options of a run: frozen, validated, in YAML and on the command line alike. Imports no torch.

Options travel flat, `{"epochs": 30, "objective": "cone", "objective.topk": 512}`, until `RunConfig` checks them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nearkin.errors import ConfigError, nearest, printable

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
LARGEST = 1 << 14  # above every width and depth in use; what a number can cost stays bounded
LONGEST = 16  # numbers in a list
MOST = 32  # options
# What timm's builders read themselves: files, weights, the form of the result; or what has an option of its own.
RESERVED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "drop_path_rate",
        "drop_rate",
        "dtype",
        "exportable",
        "feature_cfg",
        "feature_cls",
        "features_only",
        "global_pool",
        "img_size",
        "in_chans",
        "kwargs",
        "kwargs_filter",
        "model_cfg",
        "model_cls",
        "model_name",
        "no_jit",
        "num_classes",
        "out_indices",
        "pruned",
        "scriptable",
        "variant",
    }
)
INSTEAD = {
    "checkpoint_path": "--weights",
    "drop_path_rate": "--drop-path",
    "drop_rate": "--drop-rate",
    "img_size": "--image-size",
    "in_chans": "--channels",
    "pretrained": "--pretrained",
}


def checked_model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with command-line words turned into values.

    Allowed are finite numbers, true, false, and lists of up to 16 of them: values that can name no file, class or
    address. The names that timm's builders keep for themselves are refused. Whether a model takes an option shows when
    it is built. Source: our choice.

    Raises ConfigError that names the option.
    """
    if len(options) > MOST:
        raise ConfigError(f"More than {MOST} options --model.NAME; give fewer.")
    return {_name(name): _value(name, value) for name, value in options.items()}


ModelOptions = Annotated[dict[str, Any], AfterValidator(checked_model_options)]


def _name(name: str) -> str:
    if name in RESERVED or name.startswith("pretrained"):
        instead = f"; use {INSTEAD[name]}" if name in INSTEAD else "; leave it out"
        raise ConfigError(f"--model.{name} cannot be set{instead}.")
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
    """A word of the command line as YAML reads it; also numbers like 1e-3, which YAML takes for words."""
    if len(word) > 200:
        return word
    try:
        value = yaml.safe_load(word)
        return float(value) if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError, ValueError):
        return word


Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=4, le=4096)]
FREE = {
    "objective": "options",
    "model": "model_options",
}  # `objective.NAME` -> the field it belongs to
LARGEST_YAML = 1 << 20
CONFIG_FILE = "config.yaml"  # in every run folder
# What a resumed run may change: nothing that touches the weights.
FREE_ON_RESUME = frozenset({"check", "workers", "log_level", "log_every", "save_minutes"})


def _option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class RunConfig(BaseModel):
    """Every common option. `auto` is resolved before training, printed and stored (methods: docs/defaults.md)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is learnt, and from what.
    data: str = _option("digits", "built-in name, folder of class folders, or CSV/parquet table")
    objective: str = _option("cone", "what to minimise (nearkin list objectives)")
    options: dict[str, Any] = _option({}, "options of the objective, as --objective.NAME")
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = _option(
        0, "seed of data order, augmentation, initialisation"
    )
    epochs: Natural | Auto = _option("auto", "passes over the training images")
    batch_size: Count | Auto = _option("auto", "images per step, over all processes")
    accumulate: Count = _option(1, "parts the batch is split into to save memory")
    batchnorm_by_parts: bool = _option(
        False, "let BatchNorm see one part at a time, which changes the gradient"
    )

    # The network.
    model: str = _option("auto", "any timm model (nearkin list models)")
    model_options: ModelOptions = _option({}, "options of the timm model, as --model.NAME")
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    weights: Path | None = _option(None, "start from the weights in this file")
    image_size: Side | Auto = _option("auto", "side of the square input, in pixels")
    channels: Count | Auto = _option("auto", "colour channels: 1 or 3 for image files")
    stem: Literal["auto", "default", "small"] = _option("auto", "first layers for small images")
    drop_rate: Share = _option(0.0, "dropout of the pooled features")
    drop_path: Share = _option(0.0, "stochastic depth of the backbone")
    freeze_backbone: bool = _option(False, "train the heads only")

    # The data.
    val_split: Share = _option(0.1, "share of train held out where no split exists")
    images_per_class: Count | None = _option(None, "at most so many training images a class")
    bad_images: Literal["error", "skip"] = _option("error", "unreadable images stop the run or go")
    check: Literal["auto", "full", "headers"] = _option(
        "auto", "look at new image files: decode them, or headers only (auto: above 100 000)"
    )
    augment: Literal["auto", "none", "light", "medium", "strong"] = _option("auto", "strength")
    crop_scale: Annotated[float, Field(gt=0, le=1)] | Literal["auto", "padded", "centre"] = _option(
        "auto", "least share of the area in a random crop"
    )
    randaugment: Annotated[int, Field(ge=0, le=30)] | Auto = _option(
        "auto", "magnitude of RandAugment (2 operations), 0 = off"
    )
    jitter: Annotated[float, Field(ge=0, le=2)] | Auto = _option(
        "auto", "brightness, contrast and saturation; hue a quarter of it; 0 = off"
    )
    jitter_prob: Probability | Auto = _option("auto", "share of images whose colours change")
    grey_prob: Probability | Auto = _option("auto", "share of images that become grey")
    erasing: Probability | Auto = _option("auto", "share of images that lose a rectangle")
    flip: bool | Auto = _option("auto", "mirror training images (never auto on digits)")
    mixup: Amount | Auto = _option("auto", "Beta parameter of mixup, 0 = off")
    cutmix: Amount | Auto = _option("auto", "Beta parameter of CutMix, 0 = off")
    eval_size: Side | Auto = _option("auto", "side of the input in validation and test")
    eval_crop: Annotated[float, Field(ge=0.1, le=1)] | Auto = _option(
        "auto", "share of the short side that the centre crop keeps there"
    )
    sampler: Literal["shuffle", "balanced", "weighted"] = _option(
        "shuffle", "every image once; groups of a class; or classes equally often"
    )
    per_class: Count = _option(4, "images in a group of the balanced sampler")
    repeats: Count = _option(1, "crops of an image in one batch, of fewer images per epoch")
    class_weights: Literal["none", "balanced"] = _option("none", "weigh cross-entropy by class")
    cache: Literal["auto", "off", "ram", "disk"] = _option(
        "auto", "keep decoded and shrunken images, in memory or in a file that stays"
    )
    decode: Literal["full", "scaled"] = _option(
        "full", "scaled: large JPEGs for training at a fraction of their size, which changes pixels"
    )
    workers: Natural | Auto = _option("auto", "processes that load images, per rank")

    # The optimiser.
    optimizer: Literal["auto", "sgd", "adamw", "lamb"] = _option("auto", "through timm's factory")
    lr: Amount | Auto = _option("auto", "peak learning rate")
    min_lr_ratio: Amount = _option(1e-3, "final learning rate / peak", le=1)
    warmup_epochs: Amount | Auto = _option("auto", "linear warm-up, in epochs")
    weight_decay: Amount | Auto = _option("auto", "decay of weights")
    decay_all: bool = _option(False, "decay norms and biases as well")
    momentum: Share = _option(0.9, "momentum of SGD")
    nesterov: bool = _option(True, "Nesterov's momentum for SGD")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | Auto = _option(
        "auto", "learning rate of each layer / that of the layer above"
    )
    clip_grad: Positive | None = _option(None, "largest norm of the gradient")
    ema: Share = _option(0.0, "momentum of an averaged copy to evaluate, 0 = off")

    # The machine.
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = _option("auto", "of the network")
    memory_format: Literal["auto", "contiguous", "channels_last"] = _option("auto", "of images")
    device: Literal["auto", "cpu", "cuda", "mps"] = _option("auto", "where to compute")
    threads: Count | Auto = _option("auto", "CPU threads of each process")
    autotune: bool = _option(False, "settle precision, memory format and threads by a short trial")
    compile: bool = _option(False, "compile the backbone (torch.compile)")

    # The record.
    out: Path | None = _option(
        None, "run folder (must not exist); default runs/DATA-OBJECTIVE-DATE"
    )
    log_every: Count = _option(10, "steps between records in metrics.jsonl")
    save_minutes: Positive = _option(5.0, "minutes between checkpoints")
    log_level: Literal["info", "warning", "error"] = _option("info", "least text on stderr")

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
                given = nested.get(FREE[room])
                given = given if isinstance(given, Mapping) else {}
                nested[FREE[room]] = {**given, name: nested.pop(key)}
        return nested

    def flat(self) -> dict[str, Any]:
        """The options as YAML stores them: plain values, with `objective.NAME` and `model.NAME`."""
        values = self.model_dump(mode="json", exclude=set(FREE.values()))
        free = {f"{room}.{k}": v for room, f in FREE.items() for k, v in getattr(self, f).items()}
        return values | free


class EpisodeOptions(BaseModel):
    """What an episode is, how many there are, and where they are computed. Source of the defaults: SCHaNe's code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ways: Annotated[int, Field(ge=2)] = _option(5, "classes in an episode")
    shots: Annotated[int, Field(ge=1)] = _option(1, "labelled images of each class")
    queries: Annotated[int, Field(ge=1)] = _option(15, "images of each class to classify")
    episodes: Annotated[int, Field(ge=2)] = _option(3000, "episodes to average")
    copies: Annotated[int, Field(ge=0)] = _option(
        5, "augmented copies of a labelled image; 0 = the image itself, once"
    )
    split: str | None = _option(None, "train, val or test; default test, else val, else all")
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = _option(0, "seed of episodes and copies")
    bad_images: Literal["error", "skip"] = _option(
        "error", "unreadable images stop or go (RUN's own data: as in its training)"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _option("auto", "where to compute features")
    workers: Annotated[int, Field(ge=0)] = _option(0, "processes that load images")

    @property
    def needed(self) -> int:
        """Images that a class must have: those of its support and its queries."""
        return self.shots + self.queries


def validate(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Any:
    """`model(**values)`, or one ConfigError that names the option, what is wrong with it, and what is allowed."""
    try:
        return model.model_validate(dict(values))
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
        known = [f"--{prefix}{field.replace('_', '-')}" for field in model.model_fields]
        return f"Unknown option {printable(option)}.{nearest(option, known)}"
    wanted = " or ".join(dict.fromkeys(_wanted(p) for p in same))
    return f"{printable(option)} {printable(str(values.get(name)))!r} is not valid: {wanted}."


def _wanted(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat options of a YAML file. Raises ConfigError when it is missing, too large or no mapping."""
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise ConfigError(
                f"{printable(str(path))} is larger than 1 MiB; give a nearkin config."
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"Cannot read the config {printable(str(path))}: {reason}.") from None
    if "&" in text and any(isinstance(t, yaml.AliasToken) for t in _tokens(text, path)):
        raise ConfigError(f"{printable(str(path))} uses YAML aliases; write the values out.")
    try:
        loaded = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{printable(str(path))} is not valid YAML: {_one_line(error)}."
        ) from None
    return _flatten(loaded, path)


def _tokens(text: str, path: Path) -> list[Any]:
    try:
        return list(yaml.scan(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"{printable(str(path))} is not valid YAML: {_one_line(error)}."
        ) from None


class _UniqueKeys(yaml.SafeLoader):
    """safe_load, but a key given twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice} is given twice")
        return super().construct_mapping(node, deep)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:200] or "it is nested too deeply"


def _flatten(loaded: Any, path: Path) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{printable(str(path))} holds no options; write lines like `epochs: 30`."
        )
    flat: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name == "objective" and isinstance(value, dict):
            flat["objective"] = value.get("name", "cone")
            flat |= {f"objective.{k}": v for k, v in value.items() if k != "name"}
        else:
            flat[name] = value
    return flat


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win. A layer that names another objective or model drops the options of the earlier one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for room in FREE:
            if layer.get(room, merged.get(room)) != merged.get(room):
                merged = {k: v for k, v in merged.items() if not k.startswith(f"{room}.")}
        merged |= layer
    return merged


def to_yaml(config: RunConfig) -> str:
    """The options as a YAML file that `--config` reads back to the same configuration."""
    values = {k: v for k, v in config.flat().items() if not k.startswith("objective.")}
    values["objective"] = {"name": config.objective} | config.options
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
