"""The page of a finished run, `report.html` in its folder: at the end of a training, and by `nearkin report`."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearkin.errors import DataError, printable
from nearkin.evaluation.options import IDENTITY, check_run
from nearkin.evaluation.own_data import is_own, own_listing, place_of, split_options, stored_origin
from nearkin.files import write_atomic
from nearkin.report.run import Before, Facts, run_page
from nearkin.report.runs import Finished, runs_page
from nearkin.report.words import Image
from nearkin.training.metrics_log import METRICS, read_metrics
from nearkin.training.run_folder import REPORT, STATUS, stored_images, stored_settings

if TYPE_CHECKING:
    from nearkin.data.sources.listing import Listing
    from nearkin.evaluation.report_data import ReportData

FILE_OF_SEVERAL = "runs.html"
MOST_SIBLINGS = 200  # run folders that are asked whether they had the same images


def write_report(folder: Path, data: ReportData, out: Path | None = None) -> Path:
    """Write the page of a finished run. Raises SaveFailed, or ModelError when files of the run are damaged."""
    path = folder / REPORT if out is None else out
    found = facts(folder)._replace(before=last_run(folder))
    write_atomic(path, run_page(data, found).encode("utf-8"))
    return path


def report(
    run: Path,
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    bad_images: str | None = None,
) -> Path:
    """Look at a finished run again, and write its page.

    data: where its images are now; by default where they were. bad_images: `error` or `skip`; by default as in the
    training. Raises ModelError when the run has no finished model or
    no kin, DataError when its images cannot be read.
    """
    check_run(run)
    from nearkin.data.dataset import load_for_evaluation
    from nearkin.device import choose_device
    from nearkin.distributed import Runtime
    from nearkin.evaluation.ensemble import BATCH
    from nearkin.evaluation.evaluator import Evaluator
    from nearkin.evaluation.kin import read_kin
    from nearkin.evaluation.model import load_bundle
    from nearkin.evaluation.report_data import gather, see

    settings, origin = stored_settings(run), stored_origin(run)
    with Runtime(device=choose_device(device), precision="fp32") as runtime:
        bundle = load_bundle(run, runtime.device)
        kin = read_kin(run, len(bundle.classes))
        options: dict[str, Any] = split_options(settings, origin) | {
            "bad_images": settings.bad_images,
            "origin": None if origin is None else origin.names,
            "classes": bundle.classes,
            "channels": bundle.description.spec.channels,
        }
        if bad_images is not None:
            options["bad_images"] = bad_images
        source = _own(run, settings.data, data, bad_images)
        train = load_for_evaluation(source, split="train", **options).split
        split = load_for_evaluation(source, **options).split
        evaluator = Evaluator(runtime, bundle.description.transform, batch_size=BATCH, workers=0)
        predictions, seen = see(evaluator, bundle.network, split)
        found = gather(predictions, seen, kin, train, bundle.description.temperature)
        return write_report(run, found, out)


def _own(run: Path, trained: str, given: str | None, bad_images: str | None) -> Listing:
    """The images of the run, in the place `given`, else where they were. Raises DataError for others; files of other
    sizes, as where some broke, need `bad_images` skip."""
    from nearkin.data.dataset import names_of
    from nearkin.data.sources.resolve import resolve

    origin = stored_origin(run)
    if given is None:
        return own_listing(trained, origin)
    found = resolve(str(given))
    if origin is None or is_own(found, trained, origin):
        return found
    where, of = printable(str(given)), printable(str(run))
    if "train" not in found.parts or names_of(found) != origin.names:
        raise DataError(
            f"{where} has other training images than {of} was trained on, which a report shows; nearkin evaluate "
            "measures a run on other images."
        )
    if bad_images != "skip":
        raise DataError(
            f"Training images in {where} have other sizes than those of {of}; if they are the same images, "
            "--bad-images skip takes them, without those that cannot be read."
        )
    return found


def report_several(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page that compares finished runs with the first of them, by default `runs.html` in its folder. Raises
    ModelError when a run has no finished model."""
    for run in runs:
        check_run(run)
    from nearkin.evaluation.model import read_description

    found = [Finished(facts(run), read_description(run).metrics) for run in runs]
    path = runs[0] / FILE_OF_SEVERAL if out is None else out
    write_atomic(path, runs_page(found).encode("utf-8"))
    return path


def facts(folder: Path) -> Facts:
    """What the files of a run say about its training. Raises ModelError when one is damaged."""
    lines = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    settings, origin = stored_settings(folder), stored_origin(folder)
    data = Path(settings.data)
    root = str(data.parent if data.is_file() else data)
    if origin is not None and place_of(settings.data) != origin.place:  # relative to another folder
        root = f"images of {origin.place}"
    return Facts(
        run=str(folder),
        lines=tuple(lines),
        right=right(folder),
        options=settings.flat(),
        environment=_json(folder / "environment.json"),
        images=stored_images(folder),
        root=root,
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing or damaged: the page can do without."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def last_run(folder: Path) -> Before | None:
    """The run beside `folder` that was finished last before it, of the same images; None where there is none."""
    images = stored_images(folder)
    if images is None:
        return None
    now = str(_json(folder / STATUS).get("updated", "")) or "9"
    found: list[tuple[str, Path]] = []
    beside = folder.resolve().parent.glob(f"*/{IDENTITY}")
    for other in nlargest(MOST_SIBLINGS, beside, key=_changed):
        status = _json(other.parent / STATUS)
        when = str(status.get("updated", ""))
        if (
            other.parent != folder.resolve()
            and status.get("state") == "finished"
            and when < now
            and stored_images(other.parent) == images
        ):
            found.append((when, other.parent))
    for _, other in sorted(found, reverse=True):
        hits = right(other)
        if hits:
            return Before(os.path.normpath(folder / ".." / other.name), hits)
    return None


def _changed(path: Path) -> float:
    """When the file was changed; 0 where it is gone by now."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def right(run: Path) -> dict[Image, bool]:
    """Whether each image of a run's predictions.csv was recognised; empty where it cannot be read."""
    try:
        with (run / "predictions.csv").open(
            newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            return {
                (row["path"], row["label"]): row["label"] == row["predicted"]
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError, csv.Error):
        return {}
