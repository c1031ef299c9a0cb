"""Several models on one split: cached predictions, weights and the mean of the probabilities."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from nearkin.config import CONFIG_FILE, Auto, RunConfig, stored
from nearkin.data.cache import Packed
from nearkin.data.dataset import EvaluationSplit, Split, framed, load_for_evaluation
from nearkin.data.images import Files
from nearkin.data.look import Ranks
from nearkin.data.sources.listing import Listing
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DivergedError, ModelError, listed, printable
from nearkin.evaluation.evaluator import Evaluator, Probabilities, gathered
from nearkin.evaluation.metrics import reduced
from nearkin.evaluation.model import FORMAT, WEIGHTS, Bundle, load_bundle
from nearkin.evaluation.options import DESCRIPTION, BadPolicy, Tta
from nearkin.evaluation.own_data import is_own, own_listing, split_options, stored_origin
from nearkin.files import SaveFailed, own_folder, sha256, write_atomic
from nearkin.network import read_safetensors
from nearkin.process import launched
from nearkin.types import Predictions

FOLDER = "cache"
NAME, CHECK = "probabilities", "crc32"
LARGEST = 2**27  # probabilities in a cache file and in memory, per member: 512 MiB in float32
BATCH = 64
STEPS = 10_000
CLOSE = 1e-6  # nats between the log loss found and the smallest possible
LEAST = 1e-12
# What turns files into numbers.
PACKAGES = ("nearkin", "torch", "timm", "torchvision", "pillow", "simplejpeg", "numpy")


def cache_key(run: Path, split: Split, images: str, tta: str, device: torch.device) -> str:
    """SHA-256 of everything that the probabilities depend on: model, transform, views, images, versions, device.

    images: `images_digest` of the split.
    """
    digest = hashlib.sha256()
    for file in (WEIGHTS, DESCRIPTION):
        digest.update(bytes.fromhex(sha256(run / file)))
    digest.update(json.dumps([FORMAT, tta, device.type, split.name, images, versions()]).encode())
    return digest.hexdigest()


def versions() -> list[str]:
    """Of everything that turns files into numbers."""
    return [version(package) for package in PACKAGES]


def checksum(values: Tensor) -> Tensor:
    """CRC-32 of values on the CPU: a damaged file is found, and one that two runs wrote at the same time."""
    return torch.tensor([crc32(values.contiguous().numpy().data)])


def images_digest(split: Split) -> str:
    """SHA-256 of the images of a split, in order: all pixels of arrays; place, size and time of change of files, since
    two files may have one name and one size."""
    digest = hashlib.sha256()
    images = split.images.files if isinstance(split.images, Packed) else split.images
    if not isinstance(images, Files):
        for image in images.identities():
            digest.update(framed(image))
        return digest.hexdigest()
    digest.update(os.fsencode(os.path.realpath(images.files.root)))
    for path, status in images.statuses():
        size, changed = (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)
        digest.update(framed(path + b"\0%d" % size, b"%d" % changed))
    return digest.hexdigest()


def read_cached(path: Path, shape: tuple[int, int]) -> tuple[Tensor | None, str | None]:
    """The probabilities `shape` = `[N, C]` in a cache file, and why a file that exists is not used, if so."""
    try:
        if not path.is_file():
            return None, None
        tensors = read_safetensors(path)
        rows = tensors[NAME]
        known = rows.dtype in (torch.float32, torch.float64)
        if rows.shape == shape and known and torch.equal(tensors[CHECK], checksum(rows)):
            return rows, None
    except (OSError, ModelError, KeyError):
        pass
    shown = printable(str(path))
    return None, f"{shown} does not hold this model's predictions; it was made anew"


def write_cached(path: Path, probabilities: Tensor) -> str | None:
    """Store them, or return why that was not possible: evaluation goes on without a cache."""
    from safetensors.torch import save

    folder = path.parent
    try:
        own_folder(folder)
        found = probabilities.contiguous()
        write_atomic(path, save({NAME: found, CHECK: checksum(found)}))
    except OSError as error:
        shown = printable(str(folder))
        return f"the predictions were not kept: no folder {shown} ({error.strerror})"
    except SaveFailed as error:
        return f"the predictions were not kept: {error}"
    return None


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


class Member(NamedTuple):
    """A run with its model and its configuration. order: for each class of the first member, its own number."""

    run: Path
    bundle: Bundle
    config: RunConfig
    order: Tensor


class EnsemblePredictions(NamedTuple):
    """Predictions of the ensemble and of each member for one split.

    images: `images_digest` of the split. cached: for each member, whether its probabilities came from a file.
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
        config = stored(RunConfig, run / CONFIG_FILE)
        wanted = members[0].bundle.classes if members else bundle.classes
        odd = sorted(set(bundle.classes) ^ set(wanted))
        if odd:
            raise ModelError(
                f"The models of an ensemble must know the same classes; {printable(str(run))} differs in {listed(odd)}."
            )
        numbers = {name: number for number, name in enumerate(bundle.classes)}
        order = torch.tensor([numbers[name] for name in wanted], device=device)
        members.append(Member(run, bundle, config, order))
    return members


def _remarks(
    trained: Sequence[str], own: bool, data: Listing | None, split: str
) -> tuple[str, ...]:
    """What a person should know of runs that were trained on DATA."""
    if not trained or data is None:
        return ()
    verb = "was" if len(trained) == 1 else "were"
    text = f"{listed(trained)} {verb} trained on these data"
    if own:
        return (f"{text}: their split {split} is evaluated",)
    held = split in data.parts and split != "train"  # apart from what was trained on
    return () if held else (f"{text}, so the numbers are too good",)


class Ensemble:
    """The mean of the probabilities of several models; each model runs on a split once."""

    def __init__(
        self,
        members: Sequence[Member],
        runtime: Runtime,
        *,
        tta: Tta,
        workers: int | Auto,
        cache: bool,
        bad_images: BadPolicy | None = None,
    ) -> None:
        """bad_images: whether those stop or are left out; None: as in each member's training."""
        self.members, self.runtime, self._bad = members, runtime, bad_images
        self.tta, self._workers, self._cache = tta, workers, cache
        self.classes = members[0].bundle.classes
        self._loaded: dict[tuple[Any, ...], tuple[EvaluationSplit, str]] = {}

    def predict(
        self,
        data: Listing | None,
        split: str | None,
        weights: Sequence[float] | None = None,
        *,
        advice: str = "give DATA that none of them was trained on",
    ) -> EnsemblePredictions:
        """data: None for the members' own, which must then be the same images; so are data that all members were
        trained on, with a note. weights: None for equal ones.

        Raises DataError for data or a split that do not exist, ConfigError with `advice` when the members' own images
        differ.
        """
        own, trained = self._own(data, split)
        loaded = [self._load(member, data, split, own=own) for member in self.members]
        (first, notes, _), images = loaded[0]
        remarks = _remarks(trained, own, data, first.name)
        for member, (other, other_images) in zip(self.members, loaded, strict=True):
            if other_images != images or not np.array_equal(other.split.labels, first.labels):
                raise ConfigError(
                    f"{printable(str(self.members[0].run))} and {printable(str(member.run))} have other images in "
                    f"their split {first.name}: other data, --seed or --val-split; {advice}."
                )
        pairs = zip(self.members, loaded, strict=True)
        sources = [self._source(member, found.split, images) for member, (found, _) in pairs]
        batches, cached, more_notes = zip(*sources, strict=True)
        whole, members = self._combined(batches, weights)
        return EnsemblePredictions(
            first,
            images,
            whole,
            members,
            cached,
            (*notes, *remarks, *chain.from_iterable(more_notes)),
        )

    def _own(self, data: Listing | None, split: str | None) -> tuple[bool, list[str]]:
        """Whether the members' own splits of `data` are meant, since all were trained on them; and which of them were.
        An explicit test split is the same for all."""
        if data is None:
            return True, []
        if "test" in data.parts and split in (None, "test"):
            return False, []
        trained = self._trained(data)
        return len(trained) == len(self.members), trained

    def is_own(self, data: Listing) -> bool:
        """Whether all members were trained on `data`."""
        return len(self._trained(data)) == len(self.members)

    def _trained(self, data: Listing) -> list[str]:
        """The members that were trained on `data`."""
        return [
            str(member.run)
            for member in self.members
            if is_own(data, member.config.data, stored_origin(member.run))
        ]

    def probabilities(self, split: str) -> tuple[Split, Iterator[Probabilities]]:
        """The first member's own images of `split` and their probabilities, batch by batch. Raises DataError."""
        (found, _, _), images = self._load(self.members[0], None, split, own=True)
        return found, self._source(self.members[0], found, images)[0]

    def _combined(
        self, sources: Sequence[Iterator[Probabilities]], weights: Sequence[float] | None
    ) -> tuple[Predictions, tuple[Predictions, ...]]:
        """The predictions of the mixture and of each member. All members advance batch by batch, so that memory does
        not grow with images x classes."""
        shares = weights or [1 / len(sources)] * len(sources)

        def reduced_batches() -> Iterator[tuple[Tensor, ...]]:
            for batches in zip(*sources, strict=True):
                own = [
                    batch.probabilities[:, member.order.to(batch.probabilities.device)]
                    for batch, member in zip(batches, self.members, strict=True)
                ]
                parts = [
                    reduced(rows, *batch[1:]) for rows, batch in zip(own, batches, strict=True)
                ]
                labels, index = parts[0].labels, parts[0].index
                if len(parts) > 1:
                    parts.append(reduced(mixed(own, shares), labels.cpu(), index.cpu()))
                yield (*(column for part in parts for column in part[:3]), labels, index)

        *columns, labels, index = gathered(self.runtime, reduced_batches())
        found = [
            Predictions(*part, labels, index)
            for part in zip(columns[::3], columns[1::3], columns[2::3], strict=True)
        ]
        return found[-1], tuple(found[: len(sources)])

    def _load(
        self, member: Member, data: Listing | None, split: str | None, *, own: bool
    ) -> tuple[EvaluationSplit, str]:
        """The split for a member and its `images_digest`, read once for all members that need the same."""
        origin = stored_origin(member.run)
        kept = split_options(member.config, origin) if own else {}
        options = kept | {
            "bad_images": member.config.bad_images,
            "channels": member.bundle.description.spec.channels,
            "split": split,
            "own": own,
            "origin": origin.names if own and origin is not None else None,
        }
        if self._bad is not None:
            options["bad_images"] = self._bad
        key = (data.data if data else member.config.data, *options.items())
        if key not in self._loaded:
            collect = self.runtime.collect
            ranks = Ranks.on_node(self.runtime.rank, launched().per_node, collect)
            source = data or own_listing(member.config.data, origin)
            found = load_for_evaluation(source, classes=self.classes, ranks=ranks, **options)
            self._loaded[key] = found, images_digest(found.split)
        return self._loaded[key]

    def _source(
        self, member: Member, split: Split, images: str
    ) -> tuple[Iterator[Probabilities], bool, list[str]]:
        """This process's probabilities of a member, whether they come from a cache file, and notes. With a cache, and
        up to `LARGEST` values, the network runs at once and the probabilities are stored."""
        runtime = self.runtime
        spec, network = member.bundle.description.transform, member.bundle.network
        shape = (len(split.labels), len(self.classes))
        kept = self._cache and math.prod(shape) <= LARGEST
        # Members whose probabilities are not kept run side by side; each would have loaders of its own.
        alone = kept or len(self.members) == 1 or self._workers != "auto"
        workers = self._workers if alone else 0
        evaluator = Evaluator(runtime, spec, batch_size=BATCH, workers=workers)
        batches = evaluator.probabilities(network, split, self.tta)
        if not kept:
            counts = f"{shape[0]} images x {shape[1]} classes"
            too_many = f"the predictions were not kept: {counts} are too many"
            return batches, False, [too_many] if self._cache else []
        stored, notes = None, list[str | None]()
        if runtime.is_main:
            key = cache_key(member.run, split, images, self.tta, runtime.device)
            path = member.run / FOLDER / f"{key}.safetensors"
            stored, note = read_cached(path, shape)
            notes.append(note)
        stored = runtime.share(stored)
        cached = stored is not None
        if stored is None:
            stored = gathered(runtime, batches)[0]
            if runtime.is_main:
                notes.append(write_cached(path, stored))
        # The same batches as those of a network, since all members advance together.
        share, size = evaluator.share(split), evaluator.batch_size(self.tta)
        labels = torch.from_numpy(split.labels)
        rows = (torch.tensor(share[start : start + size]) for start in range(0, len(share), size))
        again = (Probabilities(stored[index], labels[index], index) for index in rows)
        return again, cached, [note for note in notes if note]
