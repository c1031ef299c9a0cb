"""The models that are judged together, and what each says of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, validate
from nearkin.data import Evaluation, load_for_evaluation
from nearkin.errors import ConfigError, printable
from nearkin.evaluation.bundle import Bundle, load_bundle
from nearkin.evaluation.cache import Found, cache_key, fingerprint, read_cached, write_cached
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


class Loaded(NamedTuple):
    """A split that was read, and what tells it from others: `fingerprint` of its images, its labels as bytes."""

    found: Evaluation
    images: str
    labels: bytes


class Answer(NamedTuple):
    """What the members say of one split. images: its `fingerprint`."""

    found: Evaluation
    images: str
    opinions: tuple[Opinion, ...]


def load_members(runs: Sequence[Path], device: torch.device) -> list[Member]:
    """Raises ModelError when a run has no finished model, ConfigError when one is given twice."""
    places = [run.resolve() for run in runs]
    for number, run in enumerate(runs):
        if places[number] in places[:number]:
            raise ConfigError(f"The run {printable(str(run))} is given twice; give every run once.")
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
        self._loaded: dict[tuple[Any, ...], Loaded] = {}
        for member in members:
            same_classes(member.bundle.classes, self.classes, str(member.run))

    def ask(self, data: str | None, split: str | None) -> Answer:
        """data: None for the members' own, which must then be the same images.

        Raises DataError for data or a split that are not there, ConfigError when the members' own images differ.
        """
        advice = "give DATA that none of them was trained on"
        return self._ask(data, split, advice)

    def ask_validation(self) -> Answer:
        """The members' own validation split. Raises as `ask`: where it is the same images for all, none has trained on
        it."""
        advice = (
            "train them on the same data with one --seed and --val-split, or use --weights equal"
        )
        return self._ask(None, "val", advice)

    def _ask(self, data: str | None, split: str | None, advice: str) -> Answer:
        loaded = [self._load(member, data, split) for member in self.members]
        first = loaded[0]
        for member, one in zip(self.members, loaded, strict=True):
            if one.images != first.images or one.labels != first.labels:
                raise ConfigError(
                    f"{printable(str(self.members[0].run))} and {printable(str(member.run))} have other images in "
                    f"their split {first.found.split.name}: other data, --seed or --val-split; {advice}."
                )
        opinions = tuple(
            self._opinion(member, one) for member, one in zip(self.members, loaded, strict=True)
        )
        return Answer(first.found, first.images, opinions)

    def _load(self, member: Member, data: str | None, split: str | None) -> Loaded:
        """What the member is asked about, read once for all members that need the same."""
        config = member.config
        options: dict[str, Any] = {
            "channels": member.bundle.description.spec.channels,
            "split": split,
            "own": data is None,
            "bad_images": config.bad_images,
        }
        if data is None:
            options |= {
                "val_split": config.val_split,
                "seed": config.seed,
                "images_per_class": config.images_per_class,
            }
        where = config.data if data is None else data
        key = (where, *options.values())
        if key not in self._loaded:
            found = load_for_evaluation(where, classes=self.classes, **options)
            labels = found.split.labels.tobytes()
            self._loaded[key] = Loaded(found, fingerprint(found.split), labels)
        return self._loaded[key]

    def _opinion(self, member: Member, loaded: Loaded) -> Opinion:
        split, own = loaded.found.split, member.bundle.classes
        found, key = Found(None), ""
        if self._cache and self._runtime.is_main:
            device = self._runtime.device
            key = cache_key(member.run, split, loaded.images, self._tta, device)
            found = read_cached(member.run, key, (len(split.labels), len(own)))
        notes = [found.note]
        said = self._runtime.share(found.probabilities)
        cached = said is not None
        if said is None:
            spec = member.bundle.description.transform
            judge = Judge(self._runtime, spec, batch_size=BATCH, workers=self._workers)
            said = judge.predictions(member.bundle.network, split, self._tta).probabilities
            if key:
                notes.append(write_cached(member.run, key, said))
        ordered = columns(said, own, self.classes)
        return Opinion(ordered, cached, tuple(note for note in notes if note))
