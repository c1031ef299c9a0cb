"""Several models on one split: their kept predictions, weights and mean probabilities."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, validate
from nearkin.data.dataset import Evaluation, Split, load_for_evaluation
from nearkin.data.images import Files
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DivergedError, ModelError, printable
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.model import DESCRIPTION, FORMAT, WEIGHTS, Bundle, load_bundle
from nearkin.evaluation.tta import Tta
from nearkin.files import SaveFailed, write_atomic
from nearkin.network import read_safetensors

FOLDER = "cache"
NAME = "probabilities"
PACKAGES = ("nearkin", "torch", "timm", "torchvision", "pillow")  # what turns files into numbers


def cache_key(run: Path, split: Split, images: str, tta: str, device: torch.device) -> str:
    """SHA-256 of all that the probabilities depend on: model, transform, views, images, versions, device.

    images: `fingerprint` of the split.
    """
    digest = hashlib.sha256()
    for file in (WEIGHTS, DESCRIPTION):
        with (run / file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    versions = [version(package) for package in PACKAGES]
    digest.update(json.dumps([FORMAT, tta, device.type, split.name, images, versions]).encode())
    return digest.hexdigest()


def fingerprint(split: Split) -> str:
    """SHA-256 of which images a split holds, in order. Of arrays all pixels; of files the place, the size and the time
    of the last change, since two files may well have one name and one size."""
    digest = hashlib.sha256()
    images = split.images
    if isinstance(images, Files):
        digest.update(os.fsencode(os.path.realpath(images.files.root)))
    for row in range(len(split.labels)):
        parts = [images.identity(row)]
        if isinstance(images, Files):
            parts.append(b"%d" % _changed(images.path(row)))
        for part in parts:  # with their lengths, so that no two lists look alike
            digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 - called once per image
    except OSError:
        return -1


class Found(NamedTuple):
    """Probabilities `[N, C]` float32 if they were kept; else why a file that is there was not taken, if one is."""

    probabilities: Tensor | None
    note: str | None = None


def read_cached(run: Path, key: str, shape: tuple[int, int]) -> Found:
    """What is kept under `key`. Anything but N rows of C probabilities is left aside."""
    path = run / FOLDER / f"{key}.safetensors"
    try:
        if not path.is_file():
            return Found(None)
        kept = read_safetensors(path).get(NAME)
    except (OSError, ModelError):
        kept = None
    if kept is None or kept.shape != shape or kept.dtype != torch.float32 or not _sound(kept):
        shown = printable(str(path))
        return Found(None, f"{shown} does not hold this model's predictions; it was made anew")
    return Found(kept)


def _sound(rows: Tensor) -> bool:
    total = rows.sum(1)
    return bool((rows >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)


def write_cached(run: Path, key: str, probabilities: Tensor) -> str | None:
    """Keep them, or say why that was not possible: a cache is no reason to fail."""
    from safetensors.torch import save

    folder = run / FOLDER
    if folder.is_symlink():
        return f"{printable(str(folder))} is a link, so the predictions were not kept there"
    try:
        folder.mkdir(exist_ok=True)
        data = save({NAME: probabilities.float().contiguous()})
        write_atomic(folder / f"{key}.safetensors", data)
    except OSError as error:
        return (
            f"the predictions were not kept: no folder {printable(str(folder))} ({error.strerror})"
        )
    except SaveFailed as error:
        return f"the predictions were not kept: {error}"
    return None


STEPS = 10_000
CLOSE = 1e-6  # nats between the log loss found and the least possible
LEAST = 1e-12


def mixed(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m p_m, `[N, C]` in float64, from each member's `[N, C]`; weights sum to 1."""
    parts = [w * p.double() for w, p in zip(weights, probabilities, strict=True)]
    return torch.stack(parts).sum(0)


def likelihood_weights(probabilities: Sequence[Tensor], labels: Tensor) -> list[float]:
    """The weights >= 0 with sum 1 that minimise the log loss of the mixture on `labels` `[N]`, L(w) = -mean_i ln q_i,
    q_i = sum_m w_m p_m(y_i), with p_m(y_i) at least 1e-12.

    w_m <- w_m r_m, r_m = mean_i p_m(y_i) / q_i: expectation maximisation from equal weights, in float64. L is convex,
    so L(w) - min L <= max_m r_m - 1; the steps end when that is at most 1e-6 nats (or after 10 000).
    Source: Dempster et al. 1977; to weigh so is our choice.

    Raises DivergedError when a probability is not finite.
    """
    rows = torch.arange(len(labels))
    own = torch.stack([p.double()[rows, labels] for p in probabilities])
    if not bool(own.isfinite().all()):
        raise DivergedError("A model's probabilities on validation are not finite; leave it out.")
    own = own.clamp(min=LEAST)
    weights = own.new_full((len(own),), 1 / len(own))
    for _ in range(STEPS):
        ratios = (own / (weights @ own)).mean(1)
        if float(ratios.max()) <= 1 + CLOSE:
            break
        weights = weights * ratios
    found: list[float] = (weights / weights.sum()).tolist()
    return found


def same_classes(own: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Raises ModelError when a member, called `name`, knows other classes than the first."""
    if set(own) != set(wanted):
        odd = sorted(set(own) ^ set(wanted))
        raise ModelError(
            f"The models of an ensemble must know the same classes; {printable(name)} differs in "
            f"{', '.join(printable(c) for c in odd[:3])}{', ...' if len(odd) > 3 else ''}."
        )


def columns(probabilities: Tensor, own: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The columns of a member with classes `own` in the order of `wanted`, which holds the same ones."""
    places = {c: number for number, c in enumerate(own)}
    return probabilities[:, [places[c] for c in wanted]]


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
            judge = Evaluator(self._runtime, spec, batch_size=BATCH, workers=self._workers)
            said = judge.predictions(member.bundle.network, split, self._tta).probabilities
            if key:
                notes.append(write_cached(member.run, key, said))
        ordered = columns(said, own, self.classes)
        return Opinion(ordered, cached, tuple(note for note in notes if note))
