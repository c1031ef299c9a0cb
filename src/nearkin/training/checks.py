"""Checks before and during a run: settings that do not fit together, anchors without positives, collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin.data.loader import SHARED_MEMORY, fitting_workers
from nearkin.data.sampling import Draws, Sampler
from nearkin.errors import ConfigError
from nearkin.evaluation.model import Built
from nearkin.network import check_eval_size
from nearkin.process import launched
from nearkin.settings import Settings
from nearkin.training.optim import names_layers


def check_built(settings: Settings, built: Built) -> None:
    """Raises ConfigError for settings that this network or objective cannot honour."""
    _check_accumulation(settings, built)
    _check_batchnorm(settings, built)
    _check_epochs(settings, built)
    _check_evaluation(settings, built)
    _check_layers(settings, built)


def _check_batchnorm(settings: Settings, built: Built) -> None:
    part = settings.batch_size // settings.accumulate
    norms = any("BatchNorm" in type(module).__name__ for module in built.network.modules())
    if part < 2 and norms:
        raise ConfigError(
            f"--batch-size {settings.batch_size} with --accumulate {settings.accumulate} gives BatchNorm one "
            "image at a time, which has no variance; use at least two images per part."
        )


def _check_accumulation(settings: Settings, built: Built) -> None:
    """Parts of a coupled batch are exact unless BatchNorm looks at one part at a time."""
    if settings.accumulate == 1 or settings.batchnorm_by_parts:
        return
    for stage in built.objective.stages():
        frozen = stage.freeze_backbone or settings.freeze_backbone
        parts = [built.network.heads[name] for name in stage.heads]
        parts += [] if frozen else [built.network.backbone]
        if stage.coupled and any(
            "BatchNorm" in type(m).__name__ for p in parts for m in p.modules()
        ):
            raise ConfigError(
                f"--accumulate {settings.accumulate} cannot be exact for {settings.objective} with BatchNorm, which "
                "would see one part at a time. Use a network without it (a transformer, or one with group norm) and "
                "--objective.head-norm layer, --freeze-backbone, more processes, or --batchnorm-by-parts, which "
                "accepts other gradients."
            )


def _check_epochs(settings: Settings, built: Built) -> None:
    stages = built.objective.stages()
    if 0 < settings.epochs < len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"--epochs {settings.epochs} is too short for the {len(stages)} stages of {settings.objective} "
            f"({names}); use at least {len(stages)}."
        )


def _check_evaluation(settings: Settings, built: Built) -> None:
    if settings.eval_size != settings.image_size:
        network, channels = built.network, settings.channels
        check_eval_size(network.backbone, network.dim, settings.model, channels, settings.eval_size)


def _check_layers(settings: Settings, built: Built) -> None:
    if settings.layer_decay < 1.0 and not names_layers(built.network.backbone):
        raise ConfigError(f"{settings.model} does not name its layers; leave out --layer-decay.")


def fit_workers(settings: Settings, views: int, *, given: bool) -> Settings:
    """Lower an automatic `workers` to what has room in shared memory. views: of an image in a training batch.

    Raises ConfigError where `workers` was given: torch's workers wait for ever when /dev/shm is full.
    """
    launch, batch, workers = launched(), settings.batch_size, settings.workers
    train = views * batch // launch.nodes * settings.image_size**2
    validation = launch.per_node * max(64, batch) * settings.eval_size**2
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


def expected_share(labels: NDArray[np.int64], batch_size: int) -> float:
    """The expected share of anchors without a positive where a batch is drawn without replacement, in [0, 1].

    mean over images i of C(N - n_i, B - 1) / C(N - 1, B - 1): none of the n_i - 1 others of i's class is among the
    B - 1 other places of the batch. The logarithm of the quotient is taken by lgamma. Exact in expectation.
    """
    counts = np.bincount(labels).astype(np.float64)
    counts = counts[counts > 0]
    total, others = counts.sum(), batch_size - 1
    possible = total - counts >= others
    strangers = np.where(possible, total - counts, others)
    log_none = _log_choose(strangers, others) - _log_choose(total - 1, others)
    return float((counts / total * np.where(possible, np.exp(log_none), 0.0)).sum())


def counted_share(draws: Draws, labels: NDArray[np.int64], batch_size: int) -> float:
    """The share of anchors without a positive in the whole batches of one epoch, counted, in [0, 1]."""
    steps = len(labels) // batch_size
    drawn = labels[draws.rows[: steps * batch_size]].reshape(steps, batch_size)
    lone = 0
    for batch in drawn:
        lone += int((np.bincount(batch) == 1).sum())
    return lone / drawn.size


def missing_positives_warning(share: float, batch_size: int, sampler: Sampler) -> str | None:
    """The warning for this share of anchors without a positive, or None."""
    if share <= TOO_MANY:
        return None
    change = "another --per-class" if sampler == "balanced" else "--sampler balanced"
    return (
        f"About {100 * share:.0f} % of the anchors will find no other image of their class in a batch of "
        f"{batch_size} and teach the contrast nothing. Use {change}, a larger --batch-size, or "
        "--objective.views 2."
    )


def _log_choose(n: NDArray[np.float64] | float, k: int) -> NDArray[np.float64]:
    lgamma = np.vectorize(math.lgamma, otypes=[np.float64])  # scipy takes 0.5 s to import
    result: NDArray[np.float64] = lgamma(n + 1) - math.lgamma(k + 1) - lgamma(n - k + 1)
    return result


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
