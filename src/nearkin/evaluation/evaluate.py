"""`nearkin.evaluate`: exact metrics of one trained model, or of several as an ensemble."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nearkin.data.sources.resolve import resolve
from nearkin.errors import ConfigError, DataError, printable
from nearkin.evaluation.options import BadPolicy, Device, Tta, Weights, check_choice, check_run
from nearkin.evaluation.own_data import is_own, stored_origin, trained_on
from nearkin.evaluation.results import Evaluation, MemberMetrics
from nearkin.files import SaveFailed

if TYPE_CHECKING:
    from nearkin.config import Auto
    from nearkin.data.dataset import Split
    from nearkin.data.sources.listing import Listing
    from nearkin.evaluation.ensemble import Ensemble, EnsemblePredictions, Member

ONE_VALIDATION = (
    "train them on the same data with one --split-seed and --val-split, or use --weights equal"
)
SAME_IMAGES = (
    "the weights were chosen on this very split, so the ensemble's numbers are too good; "
    "evaluate it on a test split or on other DATA"
)


def evaluate(
    run: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    split: str | None = None,
    tta: Tta = "none",
    weights: Weights = "equal",
    cache: bool = True,
    device: Device = "auto",
    workers: int | Auto = "auto",
    bad_images: BadPolicy | None = None,
) -> Evaluation:
    """Exact metrics of the model in a run folder, or of several as an ensemble: the mean of their probabilities.

    data: by default the runs' own, with the same splits. split: by default test, else val; the result names it.
    tta: none, flip or tencrop; the probabilities of the views are averaged. weights: of an ensemble, equal or those
    that minimise the log loss on the validation split, which no member was trained on. cache: store the probabilities
    of each model in its run folder. bad_images: `error` or `skip`, which leaves unreadable images out; by default as in
    the training. workers: processes that load images; `auto` starts them for image files beside a GPU. Computes in
    float32 without autocast, whatever the precision of the training.

    Writes `confusion-NAME.csv` and `classes-NAME.csv` into the first run folder. NAME is the split, followed by a hash
    unless one run is evaluated on its own data without test-time augmentation.

    Raises ModelError when a run has no finished model or knows other classes, DataError when data or split do not
    fit its classes, ConfigError for options that do not fit together.
    """
    runs = [Path(run)] if isinstance(run, str | Path) else [Path(one) for one in run]
    if not runs:
        raise ConfigError("Evaluate which run? Give at least one run folder.")
    check_choice("tta", tta, Tta)
    check_choice("weights", weights, Weights)
    check_choice("device", device, Device)
    if bad_images is not None:
        check_choice("bad-images", bad_images, BadPolicy)
    for one in runs:
        check_run(one)
    listing = None if data is None else resolve(str(data))
    from nearkin.device import choose_device
    from nearkin.distributed import Runtime
    from nearkin.evaluation.ensemble import Ensemble, load_members

    with Runtime(device=choose_device(device), precision="fp32") as runtime:
        members = load_members(runs, runtime.device)
        ensemble = Ensemble(
            members, runtime, tta=tta, workers=workers, cache=cache, bad_images=bad_images
        )
        return _measure(ensemble, listing, split, weights)


def _measure(
    ensemble: Ensemble, data: Listing | None, split: str | None, weights: Weights
) -> Evaluation:
    from nearkin.evaluation.ensemble import likelihood_weights
    from nearkin.evaluation.metrics import summarise, write_tables

    runs, runtime = [member.run for member in ensemble.members], ensemble.runtime
    notes: list[str] = []
    shares, validation, files = [1 / len(runs)] * len(runs), None, None
    if weights == "validation" and len(runs) > 1:
        validation = _validation(ensemble, data)
        shares = likelihood_weights([member.own for member in validation.members])
        notes += validation.notes
    found = ensemble.predict(data, split, shares)
    notes += found.notes
    if data is not None and runtime.is_main:
        notes += _trained_on(ensemble.members, data, found.split)
    if validation and validation.images == found.images:
        notes.append(SAME_IMAGES)
    metrics = summarise(found.whole, ensemble.classes)
    if runtime.is_main:
        name = _name(found.split.name, runs, data and data.data, ensemble.tta, weights)
        try:
            files = write_tables(runs[0], name, metrics)
        except SaveFailed as error:  # a folder that cannot be written
            notes.append(str(error))
    confusion_file, classes_file = runtime.share(files) or (None, None)
    top1 = [float((one.top[:, 0] == one.labels).double().mean()) for one in found.members]
    columns = zip(map(str, runs), shares, top1, found.cached, strict=True)
    return Evaluation(
        **vars(metrics),
        run=str(runs[0]),
        split=found.split.name,
        tta=ensemble.tta,
        weights=weights,
        members=tuple(MemberMetrics(*column) for column in columns),
        notes=tuple(dict.fromkeys(notes)),
        confusion_file=confusion_file,
        classes_file=classes_file,
    )


def _validation(ensemble: Ensemble, data: Listing | None) -> EnsemblePredictions:
    """Of the validation images of the training, or of `data` where those are not found and these are the same."""
    try:
        return ensemble.predict(None, "val", advice=ONE_VALIDATION)
    except DataError as error:
        if data is None:
            raise
        if ensemble.is_own(data):
            return ensemble.predict(data, "val", advice=ONE_VALIDATION)
        raise DataError(
            f"--weights validation needs the validation images of the training: {error}"
        ) from None


def _trained_on(members: Sequence[Member], data: Listing, split: Split) -> list[str]:
    """What a person should know of members that were trained on other data, but on files of this split."""
    notes, total = [], len(split.labels)
    for member in members:
        origin, shown = stored_origin(member.run), printable(str(member.run))
        if is_own(data, member.config.data, origin):
            continue  # it is known, and the split was chosen by it
        both = trained_on(split.images, member.config, origin)
        if both is None:
            gone = printable(member.config.data)
            notes.append(
                f"the training data of {shown}, {gone}, cannot be read, so these images were not compared with them"
            )
        elif both:
            all_of_them = len(both) == total
            which = "all of these images" if all_of_them else f"{len(both)} of these {total} images"
            notes.append(f"{shown} was trained on {which}, so the numbers are too good")
    return notes


def _name(split: str, runs: Sequence[Path], data: str | None, tta: str, weights: str) -> str:
    """The name in the evaluation's files: the split, and a hash of everything else that is not the default."""
    if len(runs) == 1 and data is None and tta == "none":
        return split
    where = None if data is None else os.path.realpath(data)
    key = json.dumps([[os.path.realpath(run) for run in runs], where, tta, weights])
    return f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
