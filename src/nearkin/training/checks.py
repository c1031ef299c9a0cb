"""Whether options, network and objective fit together: everything that only shows once they are built."""

from __future__ import annotations

from nearkin.config import RunConfig
from nearkin.errors import ConfigError
from nearkin.evaluation.bundle import Built
from nearkin.network import check_eval_size
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
