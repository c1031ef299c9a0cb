"""Checks before and during a run: options that do not fit together, anchors without positives, collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from nearkin.config import RunConfig
from nearkin.data.loader import SHARED_MEMORY, fitting_workers
from nearkin.data.sampling import Draws, Sampler
from nearkin.errors import ConfigError
from nearkin.evaluation.model import Built
from nearkin.network import check_eval_size
from nearkin.process import launched
from nearkin.training.optim import names_layers


def check_built(config: RunConfig, built: Built) -> None:
    """Raises ConfigError, one sentence, for what cannot be or would not be what was asked for."""
    _check_accumulation(config, built)
    _check_batchnorm(config, built)
    _check_epochs(config, built)
    _check_evaluation(config, built)
    _check_layers(config, built)


def _check_batchnorm(config: RunConfig, built: Built) -> None:
    part = int(config.batch_size) // config.accumulate
    norms = any("BatchNorm" in type(module).__name__ for module in built.network.modules())
    if part < 2 and norms:
        raise ConfigError(
            f"--batch-size {config.batch_size} with --accumulate {config.accumulate} gives BatchNorm one "
            "image at a time, which has no variance; use at least two images per part."
        )


def _check_accumulation(config: RunConfig, built: Built) -> None:
    """Parts of a coupled batch are exact unless BatchNorm looks at one part at a time."""
    if config.accumulate == 1 or config.batchnorm_by_parts:
        return
    for stage in built.objective.stages():
        frozen = stage.freeze_backbone or config.freeze_backbone
        parts = [built.network.heads[name] for name in stage.heads]
        parts += [] if frozen else [built.network.backbone]
        if stage.coupled and any(
            "BatchNorm" in type(m).__name__ for p in parts for m in p.modules()
        ):
            raise ConfigError(
                f"--accumulate {config.accumulate} cannot be exact for {config.objective} with BatchNorm, which "
                "would see one part at a time. Use a network without it (a transformer, or one with group norm) and "
                "--objective.head-norm layer, --freeze-backbone, more processes, or --batchnorm-by-parts, which "
                "accepts other gradients."
            )


def _check_epochs(config: RunConfig, built: Built) -> None:
    stages = built.objective.stages()
    if 0 < int(config.epochs) < len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"--epochs {config.epochs} is too short for the {len(stages)} stages of {config.objective} "
            f"({names}); use at least {len(stages)}."
        )


def _check_evaluation(config: RunConfig, built: Built) -> None:
    if config.eval_size != config.image_size:
        network, channels = built.network, int(config.channels)
        check_eval_size(
            network.backbone, network.dim, config.model, channels, int(config.eval_size)
        )


def _check_layers(config: RunConfig, built: Built) -> None:
    decay = config.layer_decay
    if decay != "auto" and decay < 1.0 and not names_layers(built.network.backbone):
        raise ConfigError(f"{config.model} does not name its layers; leave out --layer-decay.")


def fit_workers(config: RunConfig, views: int, *, given: bool) -> RunConfig:
    """Lower an automatic `workers` to what has room in shared memory. views: of an image in a training batch.

    Raises ConfigError where `workers` was given: torch's workers wait for ever when /dev/shm is full.
    """
    launch, batch, channels = launched(), int(config.batch_size), int(config.channels)
    train = views * batch // launch.nodes * int(config.image_size) ** 2
    validation = launch.per_node * max(64, batch) * int(config.eval_size) ** 2
    size = channels * (
        train + validation
    )  # bytes: uint8, and both loaders are open at the end of an epoch
    fitting = fitting_workers(int(config.workers), size)
    if given and fitting < int(config.workers):
        raise ConfigError(
            f"--workers {config.workers} needs {size * (2 * int(config.workers) + 1) / 2**20:.0f} MiB of shared memory "
            f"for its batches, more than is free in {SHARED_MEMORY}; use --workers {fitting}, a smaller --batch-size, "
            "or enlarge it (docker run --shm-size 1g)."
        )
    return config.model_copy(update={"workers": fitting})


TOO_MANY = 0.05


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


def warning(share: float, batch_size: int, sampler: Sampler) -> str | None:
    """What to say to a person, if anything."""
    if share <= TOO_MANY:
        return None
    change = "another --per-class" if sampler == "balanced" else "--sampler balanced"
    return (
        f"About {100 * share:.0f} % of the anchors will find no other image of their class in a batch of "
        f"{batch_size} and teach the contrast nothing. Use {change}, a larger --batch-size, or "
        "--objective.views 2."
    )


def _log_choose(n: NDArray[np.float64] | float, k: int) -> NDArray[np.float64]:
    result: NDArray[np.float64] = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    return result


NEAR = 0.01  # relative distance that counts as standing there
SMALL = 1e-3  # a term whose collapsed value is next to nothing says nothing
PATIENCE = 2  # epochs in a row


class CollapseWatch:
    """Warns once a stage when a term of the loss has stood at its collapsed value for two epochs in a row.

    The first epoch does not count: an untrained network stands there too. Source: our choice.
    """

    def __init__(self) -> None:
        self._stage, self._told = "", False
        self._since: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"stage": self._stage, "warned": self._told, "epochs": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self._stage, self._told = state["stage"], state["warned"]
        self._since = dict(state["epochs"])

    def look(
        self, stage: str, epoch: int, means: Mapping[str, float], collapsed: Mapping[str, float]
    ) -> str | None:
        """means: of the terms over the epoch (from 0); collapsed: what equal embeddings give. A sentence, or None."""
        if stage != self._stage:
            self._stage, self._told, self._since = stage, False, {}
        if epoch == 0 or self._told:
            return None
        for term, value in collapsed.items():
            there = value > SMALL and abs(means[term] - value) <= NEAR * value
            self._since[term] = self._since.get(term, 0) + 1 if there else 0
        stuck = [term for term, epochs in self._since.items() if epochs >= PATIENCE]
        if not stuck:
            return None
        self._told = True
        return (
            f"In epoch {epoch + 1} of {stage} the term {stuck[0]} is {means[stuck[0]]:.4f}, and a network whose "
            f"embeddings are all alike gives {collapsed[stuck[0]]:.4f}: it has collapsed, or has not begun to learn. "
            "Try a lower --lr, a longer --warmup-epochs, or a higher temperature."
        )
