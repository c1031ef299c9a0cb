"""Several models on one split: cached predictions, weights and the mean of the probabilities."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, validate
from nearkin.data.dataset import EvaluationSplit, Split, load_for_evaluation
from nearkin.data.images import Files
from nearkin.data.look import Ranks
from nearkin.data.sources.listing import Listing
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DivergedError, ModelError, printable
from nearkin.evaluation.evaluator import Evaluator, Probabilities, gathered
from nearkin.evaluation.metrics import reduced
from nearkin.evaluation.model import DESCRIPTION, FORMAT, WEIGHTS, Bundle, load_bundle
from nearkin.evaluation.options import Tta
from nearkin.files import SaveFailed, write_atomic
from nearkin.network import read_safetensors
from nearkin.process import launched
from nearkin.types import Predictions

FOLDER = "cache"
NAME = "probabilities"
LARGEST = 2**27  # probabilities in a cache file and in memory, per member: 512 MiB in float32
PACKAGES = ("nearkin", "torch", "timm", "torchvision", "pillow")  # what turns files into numbers


def cache_key(run: Path, split: Split, images: str, tta: str, device: torch.device) -> str:
    """SHA-256 of everything that the probabilities depend on: model, transform, views, images, versions, device.

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
    """SHA-256 of the images of a split, in order: all pixels of arrays; place, size and time of change of files, since
    two files may have one name and one size."""
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


class Cached(NamedTuple):
    """Probabilities `[N, C]` from a cache file, or None; note: why a file that exists was not used."""

    probabilities: Tensor | None
    note: str | None = None


def read_cached(run: Path, key: str, shape: tuple[int, int]) -> Cached:
    """The probabilities stored under `key`. Anything but N rows of C probabilities is not used."""
    path = run / FOLDER / f"{key}.safetensors"
    try:
        if not path.is_file():
            return Cached(None)
        stored = read_safetensors(path).get(NAME)
    except (OSError, ModelError):
        stored = None
    if stored is None or stored.shape != shape or not _are_probabilities(stored):
        shown = printable(str(path))
        return Cached(None, f"{shown} does not hold this model's predictions; it was made anew")
    return Cached(stored)


def _are_probabilities(rows: Tensor) -> bool:
    if rows.dtype not in (torch.float32, torch.float64):
        return False
    total = rows.sum(1)
    return bool((rows >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3)


def write_cached(run: Path, key: str, probabilities: Tensor) -> str | None:
    """Store them, or return why that was not possible: evaluation goes on without a cache."""
    from safetensors.torch import save

    folder = run / FOLDER
    if folder.is_symlink():
        return f"{printable(str(folder))} is a link, so the predictions were not kept there"
    try:
        folder.mkdir(exist_ok=True)
        data = save({NAME: probabilities.contiguous()})
        write_atomic(folder / f"{key}.safetensors", data)
    except OSError as error:
        return (
            f"the predictions were not kept: no folder {printable(str(folder))} ({error.strerror})"
        )
    except SaveFailed as error:
        return f"the predictions were not kept: {error}"
    return None


STEPS = 10_000
CLOSE = 1e-6  # nats between the log loss found and the smallest possible
LEAST = 1e-12


def mixed(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_m w_m p_m, `[N, C]` in float64 on the CPU, from each member's `[N, C]`; weights sum to 1."""
    parts = [w * p.cpu().double() for w, p in zip(weights, probabilities, strict=True)]
    return torch.stack(parts).sum(0)


def likelihood_weights(own: Sequence[Tensor]) -> list[float]:
    """The weights >= 0 with sum 1 that minimise the log loss of the mixture, L(w) = -mean_i ln q_i, q_i = sum_m w_m
    p_m(y_i).

    own: each member's probabilities of the labels, p_m(y_i), `[N]`; raised to at least 1e-12.
    w_m <- w_m r_m, r_m = mean_i p_m(y_i) / q_i: expectation maximisation from equal weights, in float64. L is convex,
    so L(w) - min L <= max_m r_m - 1; the steps end when that is at most 1e-6 nats (or after 10 000).
    Source: Dempster et al. 1977.

    Raises DivergedError when a probability is not finite.
    """
    rows = torch.stack([p.double() for p in own])
    if not bool(rows.isfinite().all()):
        raise DivergedError("A model's probabilities on validation are not finite; leave it out.")
    rows = rows.clamp(min=LEAST)
    weights = rows.new_full((len(rows),), 1 / len(rows))
    for _ in range(STEPS):
        ratios = (rows / (weights @ rows)).mean(1)
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


BATCH = 64


class Member(NamedTuple):
    """A run with its model and its configuration. order: for each class of the first member, its own number; None
    where the classes have the same order."""

    run: Path
    bundle: Bundle
    config: RunConfig
    order: Tensor | None


class LoadedSplit(NamedTuple):
    """A split and what identifies it: `fingerprint` of its images, its labels as bytes."""

    found: EvaluationSplit
    images: str
    labels: bytes


class Source(NamedTuple):
    """The probabilities of one member, this process's share; cached: whether they come from a file."""

    batches: Iterator[Probabilities]
    cached: bool
    notes: tuple[str, ...]


class EnsemblePredictions(NamedTuple):
    """Predictions of the ensemble and of each member for one split.

    images: `fingerprint` of the split. cached: for each member, whether its probabilities came from a file.
    notes: sentences for a person.
    """

    split: Split
    images: str
    whole: Predictions
    members: tuple[Predictions, ...]
    cached: tuple[bool, ...]
    notes: tuple[str, ...]


def load_members(runs: Sequence[Path], device: torch.device) -> list[Member]:
    """Raises ModelError when a run has no finished model or other classes, ConfigError when one is given twice."""
    places = [run.resolve() for run in runs]
    for number, run in enumerate(runs):
        if places[number] in places[:number]:
            raise ConfigError(f"The run {printable(str(run))} is given twice; give every run once.")
    members: list[Member] = []
    for run in runs:
        bundle = load_bundle(run, device)
        config: RunConfig = validate(RunConfig, read_yaml(run / CONFIG_FILE))
        wanted = members[0].bundle.classes if members else bundle.classes
        same_classes(bundle.classes, wanted, str(run))
        places_of = {name: number for number, name in enumerate(bundle.classes)}
        same = bundle.classes == wanted
        order = None if same else torch.tensor([places_of[name] for name in wanted])
        members.append(Member(run, bundle, config, order))
    return members


class Ensemble:
    """The mean of the probabilities of several models; each model runs on a split once."""

    def __init__(
        self, members: Sequence[Member], runtime: Runtime, *, tta: Tta, workers: int, cache: bool
    ) -> None:
        self.members, self._runtime = members, runtime
        self._tta, self._workers, self._cache = tta, workers, cache
        self.classes = members[0].bundle.classes
        self._loaded: dict[tuple[Any, ...], LoadedSplit] = {}

    def predict(
        self, data: Listing | None, split: str | None, weights: Sequence[float] | None = None
    ) -> EnsemblePredictions:
        """data: None for the members' own, which must then be the same images. weights: None for equal ones.

        Raises DataError for data or a split that do not exist, ConfigError when the members' own images differ.
        """
        advice = "give DATA that none of them was trained on"
        return self._predict(data, split, weights, advice)

    def predict_validation(self) -> EnsemblePredictions:
        """The members' own validation split, which no member was trained on. Raises as `predict`."""
        advice = (
            "train them on the same data with one --seed and --val-split, or use --weights equal"
        )
        return self._predict(None, "val", None, advice)

    def _predict(
        self, data: Listing | None, split: str | None, weights: Sequence[float] | None, advice: str
    ) -> EnsemblePredictions:
        loaded = [self._load(member, data, split) for member in self.members]
        first = loaded[0]
        for member, one in zip(self.members, loaded, strict=True):
            if one.images != first.images or one.labels != first.labels:
                raise ConfigError(
                    f"{printable(str(self.members[0].run))} and {printable(str(member.run))} have other images in "
                    f"their split {first.found.split.name}: other data, --seed or --val-split; {advice}."
                )
        sources = [
            self._source(member, one) for member, one in zip(self.members, loaded, strict=True)
        ]
        whole, members = self._combined([source.batches for source in sources], weights)
        return EnsemblePredictions(
            first.found.split,
            first.images,
            whole,
            members,
            tuple(source.cached for source in sources),
            (*first.found.notes, *(note for source in sources for note in source.notes)),
        )

    def _combined(
        self, sources: Sequence[Iterator[Probabilities]], weights: Sequence[float] | None
    ) -> tuple[Predictions, tuple[Predictions, ...]]:
        """The predictions of the mixture and of each member. All members advance batch by batch, so that memory does
        not grow with images x classes."""
        shares = weights or [1 / len(sources)] * len(sources)

        def rows() -> Iterator[tuple[Tensor, ...]]:
            for batches in zip(*sources, strict=True):
                parts = [reduced(*batch) for batch in batches]
                labels, index = parts[0].labels, parts[0].index
                if len(parts) > 1:
                    mixture = mixed([batch.probabilities for batch in batches], shares)
                    parts.append(reduced(mixture, labels.cpu(), index.cpu()))
                yield (*(column for part in parts for column in part[:3]), labels, index)

        *columns, labels, index = gathered(self._runtime, rows())
        found = [
            Predictions(*part, labels, index)
            for part in zip(columns[::3], columns[1::3], columns[2::3], strict=True)
        ]
        return found[-1], tuple(found[: len(sources)])

    def _load(self, member: Member, data: Listing | None, split: str | None) -> LoadedSplit:
        """The split for a member, read once for all members that need the same."""
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
        source = config.data if data is None else data
        key = (config.data if data is None else data.data, *options.values())
        if key not in self._loaded:
            collect = self._runtime.collect
            ranks = Ranks.on_node(self._runtime.rank, launched().per_node, collect)
            found = load_for_evaluation(source, classes=self.classes, ranks=ranks, **options)
            labels = found.split.labels.tobytes()
            self._loaded[key] = LoadedSplit(found, fingerprint(found.split), labels)
        return self._loaded[key]

    def _source(self, member: Member, loaded: LoadedSplit) -> Source:
        """Where the member's probabilities come from: a cache file, or the network. With a cache, and up to `LARGEST`
        values, the network runs at once and the probabilities are stored."""
        split, runtime = loaded.found.split, self._runtime
        spec, network = member.bundle.description.transform, member.bundle.network
        evaluator = Evaluator(runtime, spec, batch_size=BATCH, workers=self._workers)
        shape = (len(split.labels), len(self.classes))
        use_cache, key, cached = self._cache and math.prod(shape) <= LARGEST, "", Cached(None)
        if use_cache and runtime.is_main:
            key = cache_key(member.run, split, loaded.images, self._tta, runtime.device)
            cached = read_cached(member.run, key, shape)
        notes = [cached.note]
        if self._cache and not use_cache:
            notes.append(
                f"the predictions were not kept: {shape[0]} images x {shape[1]} classes are too many"
            )
        stored = runtime.share(cached.probabilities)
        was_stored = stored is not None
        batches = evaluator.probabilities(network, split, self._tta)
        if use_cache and stored is None:
            stored = gathered(runtime, batches)[0]
            if runtime.is_main:
                notes.append(write_cached(member.run, key, stored))
        if stored is not None:
            labels, size = torch.from_numpy(split.labels), evaluator.batch_size(self._tta)
            batches = _stored_batches(stored, labels, evaluator.share(split), size)
        if member.order is not None:
            batches = _reordered(batches, member.order)
        return Source(batches, was_stored, tuple(note for note in notes if note))


def _stored_batches(
    rows: Tensor, labels: Tensor, share: range, size: int
) -> Iterator[Probabilities]:
    """The rows `share` of `rows` `[N, C]`, in the same batches as those of a network."""
    for start in range(0, len(share), size):
        index = torch.tensor(share[start : start + size])
        yield Probabilities(rows[index], labels[index], index)


def _reordered(batches: Iterator[Probabilities], order: Tensor) -> Iterator[Probabilities]:
    for batch in batches:
        columns = order.to(batch.probabilities.device)
        yield batch._replace(probabilities=batch.probabilities[:, columns])
