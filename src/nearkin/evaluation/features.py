"""Features of images that a run was not trained on, and their few-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn needs it
from torch.nn import functional as F

from nearkin.config import CONFIG_FILE, EpisodeOptions, RunConfig, stored
from nearkin.data.dataset import Split, load_for_evaluation
from nearkin.data.loader import eval_loader, train_loader
from nearkin.data.sampling import SampleKey
from nearkin.data.sources.listing import Listing, by_bytes
from nearkin.data.transforms import TrainSpec, train_transform
from nearkin.device import choose_device, without_tf32
from nearkin.errors import DataError, ModelError, counted, listed, printable
from nearkin.evaluation.episodes import accuracy, draw, eligible, estimate
from nearkin.evaluation.model import Bundle, load_bundle
from nearkin.evaluation.own_data import (
    Origin,
    is_own,
    split_options,
    stored_origin,
    trained_on,
)
from nearkin.evaluation.results import FewShot
from nearkin.evaluation.tta import tta_views
from nearkin.types import Batch

ALL = "all"  # the split of data without splits
BATCH = 64  # images that pass through the network at once


class Features(NamedTuple):
    """Rows of unit length in float32. plain: `[N, d]`, evaluation transform. copies: `[N, copies, d]`, augmented."""

    plain: NDArray[np.float32]
    copies: NDArray[np.float32]


def extract(
    bundle: Bundle,
    split: Split,
    rows: Sequence[int],
    *,
    copies: int,
    flip: bool,
    seed: int,
    workers: int,
) -> Features:
    """The pooled features of the backbone, |f| = 1, without any head, for N `rows` of `split`, in their order.

    Copy k of row i is drawn by the augmentation `light` (mirrored only if `flip`) from (seed, i, k), as training
    draws its views: it depends neither on the workers, nor on the other rows, nor on the number of copies.
    copies 0: the plain features are the only copy. Memory: 4 N (copies + 1) d bytes.

    Raises ModelError when a feature is not finite, DataError when an image can no longer be read.
    """
    spec = bundle.description.transform
    plain = eval_loader(split, tta_views("none", spec), rows, batch_size=BATCH, workers=workers)
    found = _features(bundle, plain)
    if copies == 0:
        return Features(found[:, 0], found)
    light = TrainSpec.of("light", image_size=spec.image_size, channels=spec.channels, flip=flip)
    at_once = max(1, BATCH // copies)
    order = [
        [SampleKey(row, epoch=0, occurrence=0) for row in rows[start : start + at_once]]
        for start in range(0, len(rows), at_once)
    ]
    transform = train_transform(light)
    loader = train_loader(split, transform, order, views=copies, seed=seed, workers=workers)
    return Features(found[:, 0], _features(bundle, loader))


@torch.inference_mode()
def _features(bundle: Bundle, batches: Iterable[Batch]) -> NDArray[np.float32]:
    """`[N, V, d]` of batches of V views."""
    device = next(bundle.network.parameters()).device
    parts = []
    for batch in batches:
        with without_tf32():
            pooled = bundle.network(batch.images.flatten(0, 1).to(device)).features.float()
        if not pooled.isfinite().all():
            raise ModelError("The model gives features that are not finite; train it anew.")
        views, images = batch.images.shape[:2]
        unit = F.normalize(pooled, dim=1).view(views, images, -1)
        parts.append(unit.transpose(0, 1).cpu())
    found: NDArray[np.float32] = torch.cat(parts).numpy()
    return found


def measure(run: Path, data: Listing, protocol: EpisodeOptions) -> FewShot:
    """The few-shot accuracy; see `nearkin.fewshot`."""
    bundle = load_bundle(run, torch.device(choose_device(protocol.device)))
    config = stored(RunConfig, run / CONFIG_FILE)
    split, names, notes = _unseen(data, config, run, bundle, protocol)
    classes = eligible(split.labels, protocol)
    trained = set(bundle.classes)
    shared = [names[c] for c in classes if names[c] in trained]
    if shared:
        number = "all" if len(shared) == len(classes) else f"{len(shared)} of the"
        notes += (
            f"the run was trained on {number} {counted(len(classes), 'class', 'classes')} drawn from, so this is "
            f"not a few-shot result for them: {listed(shared)}",
        )
    rows = np.flatnonzero(np.isin(split.labels, classes))
    drawn = protocol.model_dump(include={"copies", "seed", "workers"})
    features = extract(bundle, split, rows.tolist(), flip=config.flip is True, **drawn)
    start = perf_counter()
    accuracies = play(features, split.labels[rows], classes, protocol)
    return FewShot(
        run=str(run),
        data=data.data,
        split=split.name,
        **protocol.model_dump(include={"ways", "shots", "queries", "episodes", "copies", "seed"}),
        classes=len(names),
        eligible=len(classes),
        shared=tuple(shared),
        **estimate(accuracies)._asdict(),
        episodes_per_second=protocol.episodes / (perf_counter() - start),
        notes=notes,
    )


def play(
    features: Features,
    labels: NDArray[np.int64],
    classes: NDArray[np.int64],
    protocol: EpisodeOptions,
) -> NDArray[np.float64]:
    """The accuracy of every episode, `[episodes]`. labels: `[N]`, of the rows of `features`."""
    # With matrices of 125 rows a second thread costs more than it saves, on busy cores ten times as much. The limit
    # applies to libraries that are loaded already, so scikit-learn must be imported before.
    with threadpool_limits(1):
        episodes = draw(labels, classes, protocol)
        return np.array([accuracy(e, features.copies, features.plain) for e in episodes])


def _unseen(
    data: Listing, config: RunConfig, run: Path, bundle: Bundle, protocol: EpisodeOptions
) -> tuple[Split, tuple[str, ...], tuple[str, ...]]:
    """The images to draw from, the data's own class names, and notes; a label is a place among the names.

    Raises DataError when the images do not exist, or the run was trained on some of them.
    """
    origin = stored_origin(run)
    own = is_own(data, config.data, origin)
    options = split_options(config, origin)
    if own:
        shown = printable(config.data)
        if not {"val", "test"} & set(data.parts) and options["val_split"] == 0:
            raise DataError(f"The run was trained on all images of {shown}; give other data.")
        if protocol.split == "train":
            raise DataError(
                f"The run was trained on the split train of {shown}, so its images do not measure accuracy on new "
                "ones; leave out --split, or give other data."
            )
    whole = not own and tuple(data.parts) == ("train",)
    present = {name for part in data.parts.values() for name in part.present()}
    names = bundle.classes if own else tuple(by_bytes(present))
    split, notes, _ = load_for_evaluation(
        data,
        classes=names,
        split=None if whole and protocol.split == ALL else protocol.split,
        own=own,
        bad_images=protocol.bad_images or (config.bad_images if own else "error"),
        origin=None if origin is None else origin.names,
        **options,
        channels=bundle.description.spec.channels,
    )
    if whole:
        split = split._replace(name=ALL)
    return split, names, notes + _refuse_trained(split, config, run, origin)


def _refuse_trained(
    split: Split, config: RunConfig, run: Path, origin: Origin | None
) -> tuple[str, ...]:
    """Raises DataError when the run was trained on a file of `split`, under any path.

    Returns a note when the run's own data no longer exist.
    """
    shown = printable(str(run))
    both = trained_on(split.images, config, origin)
    if both is None:
        gone = printable(config.data)
        return (
            f"the training data of {shown}, {gone}, cannot be read, so these images were not compared with them",
        )
    if both:
        raise DataError(
            f"{shown} was trained on {counted(len(both), 'image')} of these {len(split.labels)}: {listed(both)}; "
            "give images outside its training."
        )
    return ()
