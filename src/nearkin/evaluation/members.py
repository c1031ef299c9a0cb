"""The models that are judged together, and what each says of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, validate
from nearkin.data import Evaluation, Split, load_for_evaluation
from nearkin.errors import ConfigError, printable
from nearkin.evaluation.bundle import Bundle, load_bundle
from nearkin.evaluation.cache import cache_key, read_cached, write_cached
from nearkin.evaluation.ensemble import columns, same_classes
from nearkin.evaluation.judge import Judge
from nearkin.evaluation.tta import Tta
from nearkin.runtime import Runtime

BATCH = 64


class Member(NamedTuple):
    """A run with its model and its configuration."""

    run: Path
    bundle: Bundle
    config: RunConfig


class Opinion(NamedTuple):
    """What a member says: probabilities `[N, C]` in the first member's order of classes. notes: for a person."""

    probabilities: Tensor
    cached: bool
    notes: tuple[str, ...]


def load_members(runs: Sequence[Path], device: torch.device) -> list[Member]:
    """Raises ModelError when a run has no finished model."""
    members = []
    for run in runs:
        bundle = load_bundle(run, device)
        config: RunConfig = validate(RunConfig, read_yaml(run / CONFIG_FILE))
        members.append(Member(run, bundle, config))
    return members


class Jury:
    """Asks every member about one split, each model once."""

    def __init__(
        self, members: Sequence[Member], runtime: Runtime, *, tta: Tta, workers: int, cache: bool
    ) -> None:
        self.members, self._runtime = members, runtime
        self._tta, self._workers, self._cache = tta, workers, cache
        self.classes = members[0].bundle.classes
        for member in members:
            same_classes(member.bundle.classes, self.classes, str(member.run))

    def ask(self, data: str | None, split: str | None) -> tuple[Evaluation, list[Opinion]]:
        """data: None for the members' own, which must then be the same images.

        Raises DataError for data or a split that are not there, ConfigError when the members' own images differ.
        """
        found = [self._evaluation(member, data, split) for member in self.members]
        names = [_names(one.split) for one in found]
        for member, theirs in zip(self.members, names, strict=True):
            if theirs != names[0]:
                raise ConfigError(
                    f"{printable(str(self.members[0].run))} and {printable(str(member.run))} have other images in the "
                    f"split {found[0].split.name} (another --data, --seed or --val-split); give DATA that none of "
                    "them was trained on."
                )
        opinions = [
            self._opinion(member, one.split)
            for member, one in zip(self.members, found, strict=True)
        ]
        return found[0], opinions

    def _evaluation(self, member: Member, data: str | None, split: str | None) -> Evaluation:
        config = member.config
        return load_for_evaluation(
            config.data if data is None else data,
            classes=self.classes,
            channels=member.bundle.description.spec.channels,
            split=split,
            own=data is None,
            val_split=config.val_split,
            seed=config.seed,
            images_per_class=config.images_per_class,
            bad_images=config.bad_images,
        )

    def _opinion(self, member: Member, split: Split) -> Opinion:
        own = member.bundle.classes
        key, hit = "", None
        if self._cache and self._runtime.is_main:
            key = cache_key(member.run, split, self._tta, self._runtime.device)
            hit = read_cached(member.run, key, (len(split.labels), len(own)))
        hit = self._runtime.share(hit)
        notes: list[str] = []
        if hit is None:
            spec = member.bundle.description.transform
            judge = Judge(self._runtime, spec, batch_size=BATCH, workers=self._workers)
            said = judge.predictions(member.bundle.network, split, self._tta).probabilities
            if key:
                problem = write_cached(member.run, key, said)
                notes += [problem] if problem else []
        else:
            said = hit
        ordered = columns(said, own, self.classes)
        return Opinion(ordered, hit is not None, tuple(notes))


def _names(split: Split) -> tuple[Any, ...]:
    return tuple(split.images.name(row) for row in range(len(split.labels)))
