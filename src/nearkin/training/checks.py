"""Checks before and during a run: settings that do not fit together, anchors without positives, collapse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nearkin.data.loader import SHARED_MEMORY, fitting_workers
from nearkin.data.sampling import Draws, Sampler
from nearkin.errors import ConfigError
from nearkin.evaluation.model import Built
from nearkin.network import Network, blocks_below_heads, check_eval_size, names_layers
from nearkin.process import launched
from nearkin.settings import Settings
from nearkin.training.probe import readable

if TYPE_CHECKING:
    from nearkin.config import RunConfig
    from nearkin.objectives import Stage

# Options that only a projection has.
PROJECTION = ("projection", "embedding", "hidden", "head_norm")
# Options that nothing reads where another, which was not given, has this value.
UNREAD = {
    "bank": ("negatives", "batch"),
    "contrast_share": ("mode", "joint"),
    "weight": ("mode", "two-stage"),
    "teacher_momentum": ("teacher_schedule", "constant"),
    "teacher_horizon": ("teacher_schedule", "cosine"),
    "repulse_end": ("trade_off", "constant"),
}


def check_built(settings: Settings, built: Built) -> None:
    """Raises ConfigError for settings that this network or objective cannot honour."""
    _check_batchnorm(settings, built)
    stages, network = built.objective.stages(), built.network
    for stage in stages if settings.epochs > 0 else ():
        if (
            settings.freeze_backbone
            or stage.freeze_backbone
            or _blocks_learn_nothing(settings, network)
        ):
            check_learns(stage, (network.heads[name] for name in stage.heads))
    if 0 < settings.epochs < len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"--epochs {settings.epochs} is too short for the {len(stages)} stages of {settings.objective} "
            f"({names}); use at least {len(stages)}."
        )
    if settings.eval_size != settings.image_size:
        model, channels, size = settings.model, settings.channels, settings.eval_size
        check_eval_size(network.backbone, network.dim, model, channels, size)
    if settings.layer_decay < 1.0 and not names_layers(network.backbone):
        raise ConfigError(f"{settings.model} does not name its layers; leave out --layer-decay.")
    if settings.blocks != "all" and not names_layers(network.backbone):
        raise ConfigError(f"{settings.model} does not name its layers; leave out --blocks.")
    if (settings.probe or settings.refit) and readable(built.objective.heads) is None:
        option = "probe" if settings.probe else "refit"
        raise ConfigError(
            f"--{option} needs a classifier that reads the features, and that of {settings.objective} does not; "
            "leave it out, or give --objective.classifier features where the objective has it."
        )


def _blocks_learn_nothing(settings: Settings, network: Network) -> bool:
    """Whether `--blocks 0` leaves nothing of the backbone, such as a normalisation behind its blocks."""
    if settings.blocks != 0 or not names_layers(network.backbone):
        return False
    return all(number > 0 for number in blocks_below_heads(network.backbone).values())


def without_effect(settings: Settings, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Options that were given and that nothing reads, and why. Of stored settings, in which every option is given,
    nothing is said that follows from another option."""
    options, given = settings.options, config.options
    unread = [name for name in PROJECTION if name in given]
    if unread and options.get("attach") == "features" and "attach" not in given:
        names = ", ".join(f"--objective.{name.replace('_', '-')}" for name in unread)
        yield names, "where the features are contrasted; --objective.attach projection has one"
    for name, (other, value) in UNREAD.items():
        if name in given and options.get(other) == value and other not in given:
            shown, reason = name.replace("_", "-"), other.replace("_", "-")
            yield f"--objective.{shown}", f"with --objective.{reason} {value}"
    usual = {name: field.default for name, field in type(config).model_fields.items()}
    if settings.sampler != "balanced" and settings.per_class != usual["per_class"]:
        yield "--per-class", f"with --sampler {settings.sampler}"
    if settings.optimizer != "sgd":
        for name, word in (("momentum", "--momentum"), ("nesterov", "--no-nesterov")):
            if getattr(config, name) != usual[name]:
                yield word, f"with --optimizer {settings.optimizer}"


def idle_contrast(settings: Settings, built: Built) -> bool:
    """Whether `--freeze-backbone` leaves a stage that pairs samples nothing but the classifier to learn."""
    if not settings.freeze_backbone:
        return False
    for stage in built.objective.stages():
        heads = [built.network.heads[name] for name in stage.heads if name != "classifier"]
        learning = [p for part in (*heads, built.objective) for p in part.parameters()]
        if stage.pairs != "none" and not learning:
            return True
    return False


def check_learns(stage: Stage, modules: Iterable[nn.Module]) -> None:
    """Raises ConfigError where nothing of a stage can learn."""
    if any(p.requires_grad for module in modules for p in module.parameters()):
        return
    raise ConfigError(
        f"Nothing can learn in the stage {stage.name}: the backbone is frozen, and its features are contrasted as they "
        "are. Leave out --freeze-backbone or --blocks 0, or give --objective.attach projection."
    )


def _check_batchnorm(settings: Settings, built: Built) -> None:
    """It needs two images a part, and parts of a coupled batch are exact unless it looks at one part at a time."""
    batch, parts, network = settings.batch_size, settings.accumulate, built.network
    still = settings.freeze_batchnorm  # then the heads alone may have statistics of a batch
    if batch // parts < 2 and _has_batchnorm(network.heads if still else network):
        raise ConfigError(
            f"--batch-size {batch} with --accumulate {parts} gives BatchNorm one "
            "image at a time, which has no variance; use at least two images per part."
        )
    for stage in built.objective.stages():
        if parts == 1 or settings.batchnorm_by_parts or not stage.coupled:
            continue
        frozen = stage.freeze_backbone or settings.freeze_backbone or still
        trained = [network.heads[name] for name in stage.heads]
        if any(map(_has_batchnorm, trained if frozen else [*trained, network.backbone])):
            raise ConfigError(
                f"--accumulate {parts} cannot be exact for {settings.objective} with BatchNorm, which "
                "would see one part at a time. Use a network without it (a transformer, or one with group norm) and "
                "--objective.head-norm layer, --freeze-batchnorm or --freeze-backbone with trained weights, more "
                "processes, or --batchnorm-by-parts, which accepts other gradients."
            )


def _has_batchnorm(module: nn.Module) -> bool:
    return any("BatchNorm" in type(each).__name__ for each in module.modules())


def evaluated_at_once(settings: Settings, ranks: int) -> int:
    """Images of a batch of evaluation in each process: as many as train at once there, at least 64."""
    return max(64, settings.batch_size // (ranks * settings.accumulate))


def fit_workers(settings: Settings, views: int, *, given: bool) -> Settings:
    """Lower an automatic `workers` to what has room in shared memory. views: of an image in a training batch.

    Raises ConfigError where `workers` was given: torch's workers wait for ever when /dev/shm is full.
    """
    launch, batch, workers = launched(), settings.batch_size, settings.workers
    train = views * batch // launch.nodes * settings.image_size**2
    at_once = evaluated_at_once(settings, launch.world_size)
    validation = launch.per_node * at_once * settings.eval_size**2
    # Bytes: uint8, and both loaders are open at the end of an epoch.
    size = settings.channels * (train + validation)
    fitting = fitting_workers(workers, size)
    if given and fitting < workers:
        raise ConfigError(
            f"--workers {workers} needs {size * (2 * workers + 1) / 2**20:.0f} MiB of shared memory for its batches, "
            f"more than is free in {SHARED_MEMORY}; use --workers {fitting}, a smaller --batch-size, or enlarge it "
            "(docker run --shm-size 1g)."
        )
    return settings.model_copy(update={"workers": fitting})


TOO_MANY = 0.05  # share of anchors without a positive above which the user is warned


def share_without_positive(
    draws: Draws, labels: NDArray[np.int64], batch_size: int, within: int | None = None
) -> float:
    """The share of anchors without a positive in the whole batches of one epoch, in [0, 1]. within: see `Stage`."""
    steps = len(labels) // batch_size
    drawn = labels[draws.rows[: steps * batch_size]].reshape(steps, batch_size)
    size = within or batch_size
    blocks = (batch[at : at + size] for batch in drawn for at in range(0, batch_size, size))
    return sum(int((np.bincount(block) == 1).sum()) for block in blocks) / drawn.size


def missing_positives_warning(share: float, size: int, sampler: Sampler) -> str | None:
    """The warning for this share of anchors without a positive among `size` images, or None."""
    if share <= TOO_MANY:
        return None
    change = "another --per-class" if sampler == "balanced" else "--sampler balanced"
    return (
        f"About {100 * share:.0f} % of the anchors will find no other image of their class among the {size} that "
        f"they are compared with, so nothing attracts them. Use {change}, a larger --batch-size, or "
        "--objective.views 2."
    )


NEAR = 0.01  # relative distance from the collapsed value
SMALL = 1e-3  # terms whose collapsed value is smaller are ignored
PATIENCE = 2  # epochs in a row


class CollapseWatch:
    """Warns once per stage when a term of the loss equals the loss of constant embeddings for two epochs in a row.

    The first epoch of a stage does not count: an untrained network gives that value as well.
    """

    def __init__(self) -> None:
        self._stage, self._warned = "", False
        self._epochs: dict[str, int] = {}  # by term, how long it has had its collapsed value

    def check(
        self, stage: str, epoch: int, means: Mapping[str, float], collapsed: Mapping[str, float]
    ) -> str | None:
        """A warning, or None. means: of the terms over the epoch (from 0). collapsed: their values at collapse."""
        if stage != self._stage:
            self._stage, self._warned, self._epochs = stage, False, {}
        if epoch == 0 or self._warned:
            return None
        for term, value in collapsed.items():
            near = value > SMALL and abs(means[term] - value) <= NEAR * value
            self._epochs[term] = self._epochs.get(term, 0) + 1 if near else 0
        stuck = [term for term, epochs in self._epochs.items() if epochs >= PATIENCE]
        if not stuck:
            return None
        self._warned = True
        return (
            f"In epoch {epoch + 1} of {stage} the term {stuck[0]} is {means[stuck[0]]:.4f}, and a network whose "
            f"embeddings are all alike gives {collapsed[stuck[0]]:.4f}: it has collapsed, or has not begun to learn. "
            "Try a lower --lr, a longer --warmup-epochs, or a higher temperature."
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain values."""
        return {"stage": self._stage, "warned": self._warned, "epochs": self._epochs}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._stage, self._warned = state["stage"], state["warned"]
        self._epochs = dict(state["epochs"])
