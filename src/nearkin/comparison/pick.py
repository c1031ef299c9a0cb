"""`--pick`: the winner by validation, trained once more on training and validation images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearkin.comparison import launch
from nearkin.comparison.plan import Job, jobs
from nearkin.comparison.results import Comparison, Scores, contrasts
from nearkin.comparison.splits import with_limited_training, with_validation_in_training
from nearkin.comparison.statistics import LEAST_IMAGES
from nearkin.config import RunConfig, to_yaml
from nearkin.data.dataset import choose
from nearkin.data.sources.builtin import BUILTIN
from nearkin.data.sources.resolve import resolve
from nearkin.errors import NearkinError, printable
from nearkin.files import write_atomic
from nearkin.training import run_folder
from nearkin.training.console import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nearkin.comparison.api import Planned, Request
    from nearkin.data.sources.listing import Listing
    from nearkin.settings import Settings

NAME = "picked"
TABLE = "picked.csv"


def pick(comparison: Comparison, planned: Planned, request: Request, *, quiet: bool) -> Comparison:
    """The comparison with its winner trained: the entry with the largest difference among those that are better than
    cross-entropy on the validation images, by the same statistics; cross-entropy where none is.

    Raises NearkinError when the run fails.
    """
    winner = _winner(comparison, _data(planned.values))
    term = next(each for each in planned.terms if each.entry.name == winner)
    folder = comparison.folder
    options: dict[str, Any] = planned.values | {"val_split": 0.0}
    if _written(term.settings, planned.values, request.seed, folder / TABLE):
        options |= {"data": str(folder / TABLE), "images_per_class": None}
    job: Job = jobs([term], options, [request.seed])[0]
    name = f"{NAME}-{term.entry.folder}"
    write_atomic(folder / f"{name}.yaml", to_yaml(job.config, given=True).encode())
    if run_folder.stored_state(folder / name) != "finished":
        say(f"picked on validation: {winner}; training it on train and validation", quiet)
        ended: list[int] = []
        launch.local(folder, [name], planned.machine(1, 1), lambda _, code: ended.append(code))
        if ended[0]:
            outcome = launch.outcome(folder, name, ended[0])
            raise NearkinError(
                printable(f"The run {outcome}. The comparison itself is in {folder}.")
            )
    return replace(comparison, picked=(winner, str(folder / name)))


def _data(values: Mapping[str, Any]) -> str:
    return str(values.get("data", RunConfig.model_fields["data"].default))


def _written(settings: Settings, values: Mapping[str, Any], seed: int, table: Path) -> bool:
    """Whether a table of the images to train on was needed, and written."""
    listing = resolve(_data(values))
    if settings.images_per_class is None:
        return with_validation_in_training(listing, table)
    chosen = choose(
        listing,
        channels="auto",
        val_split=settings.val_split,
        seed=seed,
        images_per_class=settings.images_per_class,
        split_seed=settings.split_seed,
    )
    return with_limited_training(chosen, table)


def _winner(comparison: Comparison, data: str) -> str:
    """data: where the images are now. The baseline where there are too few images to judge by."""
    own = None if data in BUILTIN else resolve(data)
    scores = {
        (run.entry, run.seed): _validation(comparison.folder / run.folder, own)
        for run in comparison.runs
        if run.state == "finished"
    }
    if min((len(each.labels) for each in scores.values()), default=0) < LEAST_IMAGES:
        return comparison.baseline
    idle = {run.entry for run in comparison.runs if run.epochs == 0}
    better = [
        each
        for each in contrasts(scores, comparison.baseline, idle=idle)
        if each.measure == "top1" and each.verdict == "better"
    ]
    best = max(better, key=lambda each: each.difference, default=None)
    return comparison.baseline if best is None else best.entry


def _validation(run: Path, data: Listing | None) -> Scores:
    """The predictions of a run for its validation images. data: None for built-in ones."""
    from nearkin.distributed import Runtime
    from nearkin.evaluation.ensemble import Ensemble, load_members

    with Runtime(device="cpu", precision="fp32") as runtime:
        members = load_members([run], runtime.device)
        ensemble = Ensemble(members, runtime, tta="none", workers="auto", cache=True)
        found = ensemble.predict(data, "val")
    predictions, names = found.whole, ensemble.classes
    labels, top = predictions.labels.numpy(), predictions.top[:, 0].numpy()
    images = found.split.images
    return Scores(
        tuple(images.name(int(row)) for row in predictions.index),
        tuple(names[label] for label in labels),
        tuple(names[label] for label in top),
        np.asarray(predictions.own.double().numpy()),
    )
