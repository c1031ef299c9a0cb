"""The value of every `auto`: all rules are here, and docs/defaults.md explains them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from nearkin.config import LEAST_SIDE, SCRATCH_OBJECTIVE, RunConfig
from nearkin.data.transforms import EvalSpec, TrainSpec
from nearkin.errors import ConfigError
from nearkin.process import GPU_THREADS, MOST_WORKERS
from nearkin.settings import DataSettings, Settings

DIGIT_LIKE = ("digits", "mnist", "svhn")  # a mirrored digit is another digit, or none
SMALL_WORK = 2e9  # parameters x pixels; below it one thread is fastest
TINY_IMAGE, SMALL_IMAGE = 16, 64

# On photos, from pretrained weights (docs/decisions/018-photos.md; benchmarks/photo_search.py chose them).
PHOTO_MODEL = "tf_efficientnet_lite0"
MINUTES = 15.0  # without a GPU
TUNED_OBJECTIVE = "supcon"
TUNED_SIDE, TUNED_EVAL_SIDE = 160, 192  # without a GPU; random crops enlarge what they show
GPU_SIDE = 224
EVAL_CROP = 0.875  # share of the short side that evaluation keeps
TUNED_EPOCHS = 60
TUNED_BATCH = 32
TUNED_LR = 3e-4  # at a batch of 32; a third of it for networks that prefer adamw
TUNED_HEAD_LR = 3.0
PROBE_IMAGES = 20_000  # more take minutes and change the weights little
TUNED_BLOCKS = (
    4  # of the photo model, all with one learning rate; other models learn whole, with TUNED_DECAY
)
TUNED_DECAY = 0.75
USUAL_LAYERS = 13  # of a ViT of 12 blocks; in deeper networks the lowest layer learns at the rate of its lowest
NARROW: dict[str, Any] = {"channels": [48, 96, 192, 384], "stem_width": 24}  # 2.8 M weights


class DataFacts(NamedTuple):
    """What is known once the data set is listed.

    images: training images after the splits. side: their median short side in pixels; 0 where `image_size` is given.
    channels: of the images. room: bytes of memory that a cache may take; 0 where there are no files to decode. files:
    whether the images are files. device: type of the device that trains.
    """

    images: int
    side: int
    channels: int
    room: int = 0
    files: bool = False
    device: str = "cpu"


class NetworkFacts(NamedTuple):
    """What is known once the network is built and the processes have started.

    images: training images. parameters: of the backbone, their number. layers: that it names, or 0.
    prefers_adamw, memory_format: see `nearkin.network`. stem, options: of the backbone and the objective, resolved.
    probed: whether the classifier reads the features. positives: whether the objective needs other images of the
    class. device, precision: of the runtime. cores: for this process. files: whether each batch is decoded from files.
    """

    images: int
    parameters: int
    layers: int
    prefers_adamw: bool
    memory_format: Literal["contiguous", "channels_last"]
    stem: Literal["default", "small"]
    options: dict[str, Any]
    probed: bool
    positives: bool
    device: str
    precision: str
    cores: int
    files: bool


def resolve_data(config: RunConfig, facts: DataFacts) -> DataSettings:
    """Every option that follows from the training images."""
    images, channels = facts.images, facts.channels
    size = _image_size(config, facts)
    photos = facts.files and size > SMALL_IMAGE
    own = config.model != "auto"
    pretrained = config.pretrained or (
        photos and not own and config.weights is None and not config.from_scratch
    )
    tuned = pretrained or config.weights is not None
    packaged = photos and _tunes_photo_model(config)
    objective = config.objective
    if objective == "auto":
        objective = TUNED_OBJECTIVE if tuned else SCRATCH_OBJECTIVE
    usual: Literal["light", "strong"] = "strong" if objective == "attract-repulse" else "light"
    augment = usual if config.augment == "auto" else config.augment
    strong = augment == "strong"
    usual_size = TUNED_EVAL_SIDE if size == TUNED_SIDE and packaged else size
    eval_size = usual_size if config.eval_size == "auto" else config.eval_size
    tiny = size <= TINY_IMAGE
    model_options = NARROW if tiny and not own else {}
    scratch = "resnet10t" if tiny else "resnet18"
    limited = photos and tuned and facts.device == "cpu" and config.epochs == "auto"
    values: dict[str, Any] = {
        "objective": objective,
        "model": PHOTO_MODEL if photos and pretrained else scratch,
        "image_size": size,
        "batch_size": _batch_size(images, TUNED_BATCH if tuned else None),
        "minutes": MINUTES if limited else 0.0,
        "augment": augment,
        "channels": channels,
        "epochs": _epochs(config.data, images, tuned),
        "flip": augment != "none" and config.data not in DIGIT_LIKE,
        "eval_size": eval_size,
        "eval_crop": 1.0 if eval_size <= SMALL_IMAGE else EVAL_CROP,
        "mixup": 0.2 if strong else 0.0,
        "cutmix": 1.0 if strong else 0.0,
        "cache": "off",
    }
    parts = TrainSpec.of(augment, image_size=size, channels=channels)
    given = config.model_dump() | {
        "model_options": model_options | config.model_options,
        "pretrained": pretrained,
    }
    filled = DataSettings.model_validate(_fill(given, parts.model_dump() | values))
    fits = 4 * images * channels * size**2 <= facts.room  # oblong images and other splits included
    exact = shrinks_exactly(filled) and filled.decode == "full"
    in_memory = config.cache == "auto" and fits and exact
    return filled.model_copy(update={"cache": "ram"}) if in_memory else filled


def resolve(config: DataSettings, facts: NetworkFacts) -> Settings:
    """Every other option: those that follow from the network, the device and the processes on it.

    `out` is dropped: the place of a run is no setting, and another run may reuse them.
    """
    pretrained = is_pretrained(config)
    adam = pretrained or facts.prefers_adamw
    optimizer = config.optimizer if config.optimizer != "auto" else ("adamw" if adam else "sgd")
    sgd = optimizer == "sgd"
    photo_model = config.model == PHOTO_MODEL
    decays = pretrained and facts.layers > 0 and optimizer == "adamw" and not photo_model
    # Where contrast needs other images of the class, they must meet in a batch.
    # A number that was given and does not fit is an error below.
    asked = config.per_class != RunConfig.model_fields["per_class"].default
    fits = config.batch_size % config.per_class == 0 or asked
    grouped = pretrained and facts.positives and fits and config.repeats == 1
    small = facts.parameters * config.image_size**2 < SMALL_WORK
    most = facts.cores if facts.device == "cpu" else GPU_THREADS
    values: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": _lr(optimizer, config, pretrained, facts.prefers_adamw),
        "head_lr": TUNED_HEAD_LR if pretrained and optimizer == "adamw" else 1.0,
        "blocks": TUNED_BLOCKS if pretrained and photo_model else "all",
        "probe": pretrained and facts.probed,
        "probe_images": PROBE_IMAGES,
        # With another first layer the statistics after it are not those of the weights.
        "freeze_batchnorm": pretrained and not (config.pretrained and facts.stem == "small"),
        "sampler": "balanced" if grouped else "shuffle",
        "weight_decay": (5e-4 if facts.images < 100_000 else 1e-4) if sgd else 0.05,
        "layer_decay": TUNED_DECAY ** min(1.0, USUAL_LAYERS / facts.layers) if decays else 1.0,
        "warmup_epochs": warmup_epochs(config.epochs),
        "memory_format": facts.memory_format,
        "device": facts.device,
        "precision": facts.precision,
        "threads": 1 if small else min(most, facts.cores),
        "workers": min(MOST_WORKERS, facts.cores) if facts.files else 0,
    }
    given = config.model_dump() | {"options": facts.options, "stem": facts.stem, "out": None}
    settings = Settings.model_validate(_fill(given, values))
    _check_sampler(settings, settings.batch_size)
    return settings


def photo_sides(device: str) -> tuple[int, int]:
    """Sides of the input of PHOTO_MODEL in training and in evaluation, on a device of this type."""
    return (TUNED_SIDE, TUNED_EVAL_SIDE) if device == "cpu" else (GPU_SIDE, GPU_SIDE)


def is_pretrained(config: RunConfig) -> bool:
    """Whether the run starts from trained weights."""
    return config.pretrained or config.weights is not None


def warmup_epochs(epochs: int) -> float:
    """A twentieth of the training."""
    return 0.05 * epochs


def shrinks_exactly(config: DataSettings) -> bool:
    """Whether shrinking the images to `image_size` first changes no pixel that the network reads."""
    whole = config.crop_scale in ("padded", "centre")
    same = config.eval_size == config.image_size and config.eval_crop == 1
    return config.image_size <= SMALL_IMAGE and whole and same


def named_from_scratch(config: RunConfig, settings: Settings) -> bool:
    """Whether a model was named for photos, and nothing was said of its weights."""
    own = config.model != "auto" and not config.from_scratch
    photos = settings.image_size > SMALL_IMAGE
    return own and photos and not is_pretrained(settings)


def read_whole(config: DataSettings) -> bool:
    """Whether batches are read from one array in memory, which is faster than loader processes."""
    return config.cache != "off" and config.image_size <= SMALL_IMAGE


def side_in_cache(config: DataSettings) -> int:
    """The short side of cached images: that of evaluation, so that it reads the same pixels as without a cache. With
    random crops it is larger, so that fewer of them have to be enlarged."""
    size, regions = config.image_size, not isinstance(config.crop_scale, str)
    return max(eval_spec(config).resize, round(size / EVAL_CROP) if regions else size)


def side_of_scaled(config: DataSettings) -> int:
    """The least short side of scaled JPEGs, with which the smallest random crop has `image_size` pixels a side, and
    evaluation, which the probe and the kin use for training images, enlarges none."""
    share = 1.0 if isinstance(config.crop_scale, str) else config.crop_scale
    return max(eval_spec(config).resize, math.ceil(config.image_size / math.sqrt(share)))


def eval_spec(config: DataSettings) -> EvalSpec:
    """How images are evaluated."""
    return EvalSpec.for_size(config.eval_size, config.channels, config.eval_crop)


def check(config: DataSettings, *, images: int, world_size: int) -> None:
    """Raises ConfigError for settings that do not fit together."""
    batch, parts = config.batch_size, world_size * config.accumulate
    if batch > images:
        raise ConfigError(
            f"--batch-size {batch} is larger than the {images} training images; "
            f"use at most {images}."
        )
    if batch % parts:
        raise ConfigError(
            f"--batch-size {batch} cannot be divided among {world_size} processes x "
            f"--accumulate {config.accumulate}; use {_multiples_near(batch, parts)}."
        )
    if (config.mixup > 0 or config.cutmix > 0) and (batch // parts) % 8:
        raise ConfigError(
            f"Mixing needs a multiple of 8 images per process and part, not {batch // parts}; use "
            f"--batch-size {max(1, batch // parts // 8) * 8 * parts} or --mixup 0 --cutmix 0."
        )
    if config.decode == "scaled" and config.cache != "off":
        raise ConfigError(
            f"--decode scaled is for images that are decoded anew in every epoch, --cache {config.cache} decodes them "
            "once; use one of them."
        )
    _check_sampler(config, batch)


def _check_sampler(config: DataSettings, batch: int) -> None:
    size = config.per_class
    if config.sampler == "balanced" and batch % size:
        raise ConfigError(
            f"--batch-size {batch} is no multiple of --per-class {size}; "
            f"use {_multiples_near(batch, size)}, or another --per-class."
        )
    if config.repeats > 1 and config.sampler not in ("auto", "shuffle"):
        raise ConfigError(
            f"--repeats {config.repeats} needs --sampler shuffle, not {config.sampler}."
        )
    if config.repeats > batch:
        raise ConfigError(f"--repeats {config.repeats} is more than --batch-size {batch}.")


def _multiples_near(batch: int, of: int) -> str:
    below = batch // of * of
    return f"{below}, {below + of}" if below else f"{of}"


def _fill(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The options as given, with `values` in place of `auto`."""
    return given | {name: value for name, value in values.items() if given[name] == "auto"}


def _batch_size(images: int, wanted: int | None) -> int:
    """The power of two nearest to `wanted`, by default N / 48, within 16 ... 128, never above N."""
    powers = [p for p in (1, 2, 4, 8, 16, 32, 64, 128) if p <= images]
    usual = [p for p in powers if p >= 16] or powers[-1:] or [1]
    return min(usual, key=lambda power: abs(power - (wanted or images / 48)))


def _lr(optimizer: str, config: DataSettings, pretrained: bool, attention: bool) -> float:
    """From scratch in proportion to the batch; small images: 0.1 at a batch of 128, as is usual there
    (docs/decisions/005). Pretrained, with AdamW: with the square root of the batch."""
    per_256 = config.batch_size / 256
    if optimizer == "sgd":
        return (0.2 if config.image_size <= SMALL_IMAGE else 0.1) * per_256
    if not pretrained:
        return 5e-4 * per_256
    return TUNED_LR * math.sqrt(config.batch_size / 32) / (3 if attention else 1)


def _epochs(data: str, images: int, tuned: bool) -> int:
    least, most = (10, TUNED_EPOCHS) if tuned else (30, 100)
    return 12 if data == "digits" else max(least, min(most, 500_000 // max(images, 1)))


def _image_size(config: RunConfig, facts: DataFacts) -> int:
    """That of the images, up to 224. The trained network for photos reads them larger than small originals are, as it
    was trained with 224 pixels; without a GPU smaller."""
    if config.image_size != "auto":
        return config.image_size
    if facts.files and facts.side > SMALL_IMAGE and _tunes_photo_model(config):
        return photo_sides(facts.device)[0]
    return max(LEAST_SIDE, min(facts.side, 224))


def _tunes_photo_model(config: RunConfig) -> bool:
    """Whether photos are read by PHOTO_MODEL with trained weights, by its name or as the default."""
    if config.model == "auto":
        return config.weights is None and not config.from_scratch
    return config.model == PHOTO_MODEL and (config.pretrained or config.weights is not None)
