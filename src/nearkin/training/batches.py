"""Which training images a run reads, in which order and with which augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nearkin.data.dataset import Split
from nearkin.data.loader import PATIENCE, train_loader
from nearkin.data.sampling import Draw, SampleKey, TrainOrder, drawing
from nearkin.data.transforms import Pipeline, TrainSpec, train_transform
from nearkin.distributed import Runtime
from nearkin.settings import Settings
from nearkin.types import Batch


def draw_of(settings: Settings, labels: NDArray[np.int64]) -> Draw:
    """How the run's epochs draw their images."""
    return drawing(
        settings.sampler,
        labels,
        seed=settings.seed,
        batch_size=settings.batch_size,
        per_class=settings.per_class,
        repeats=settings.repeats,
    )


def transform_of(settings: Settings) -> Pipeline:
    """The augmentation of training images."""
    return train_transform(TrainSpec.model_validate(settings, from_attributes=True))


def batch_keys(settings: Settings, split: Split, step: int) -> list[SampleKey]:
    """The draws of the global batch of a step, in the order of all processes."""
    order = TrainOrder(
        len(split.labels),
        seed=settings.seed,
        batch_size=settings.batch_size,
        first=step,
        last=step + 1,
        draw=draw_of(settings, split.labels),
    )
    return next(iter(order))


def train_batches(
    settings: Settings, split: Split, runtime: Runtime, *, views: int, first: int, last: int
) -> Iterator[Batch]:
    """This process's blocks of the global batches from step `first` to step `last` (exclusive)."""
    order = TrainOrder(
        len(split.labels),
        seed=settings.seed,
        batch_size=settings.batch_size,
        first=first,
        last=last,
        rank=runtime.rank,
        world_size=runtime.world_size,
        draw=draw_of(settings, split.labels),
    )
    return train_loader(
        split,
        transform_of(settings),
        order,
        views=views,
        seed=settings.seed,
        workers=settings.workers,
        pin_memory=runtime.device.type == "cuda",
        patience=PATIENCE if runtime.world_size > 1 else 0.0,
    )
