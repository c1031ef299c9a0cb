"""`nearkin.fewshot`: few-shot accuracy of a trained model's features."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict, Unpack

from nearkin.config import EpisodeOptions, validate
from nearkin.data.sources.resolve import resolve
from nearkin.evaluation.options import Device, check_run
from nearkin.evaluation.results import FewShot


class EpisodeKeywords(TypedDict, total=False):
    """The fields of `EpisodeOptions`, for type checkers; a test compares them."""

    ways: int
    shots: int
    queries: int
    episodes: int
    copies: int
    split: str | None
    seed: int
    bad_images: Literal["error", "skip"] | None
    device: Device
    workers: int


def fewshot(run: str | Path, data: str | Path, **options: Unpack[EpisodeKeywords]) -> FewShot:
    """The accuracy of few-shot episodes on DATA, with the pooled features of the model in a run folder.

    In each episode a logistic regression learns `ways` classes from `copies` augmented copies of `shots` images
    each, and classifies `queries` others of each class. The classes are DATA's own; those that the run was trained on
    are listed in `shared`. options: `EpisodeOptions`. Of the run's own data, only the test or the val split can be
    used. Precision: as in `evaluate`.

    Raises ConfigError for an option that is unknown or out of range; ModelError when `run` has no finished model;
    DataError when DATA has too few images, or images that the run was trained on.
    """
    checked: EpisodeOptions = validate(EpisodeOptions, options)
    check_run(Path(run))
    listing = resolve(str(data))
    from nearkin.evaluation.features import measure

    return measure(Path(run), listing, checked)
