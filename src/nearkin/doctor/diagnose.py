"""All checks of a data set, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearkin.data.dataset import choose
from nearkin.data.sources.resolve import resolve
from nearkin.doctor.classes import class_findings, folder_findings
from nearkin.doctor.duplicates import contradicting, copy_findings, find_copies, superfluous
from nearkin.doctor.features import Described, describe, pixel_features
from nearkin.doctor.findings import Finding, count
from nearkin.doctor.inventory import Inventory
from nearkin.doctor.labels import label_findings
from nearkin.doctor.outlook import checked_forecast, objective_findings
from nearkin.doctor.quality import quality_findings
from nearkin.doctor.scan import Scan, scan
from nearkin.doctor.table import Marks, read_marks
from nearkin.errors import ConfigError, printable
from nearkin.process import exit_if_importing_main


@dataclass(frozen=True)
class Report:
    """What was found. data: as it was given. inventory: with the labels that marks correct. marks: of a person.
    superfluous: rows of `inventory` that cannot be read or show what another image shows, to be left out of a table."""

    data: str
    findings: tuple[Finding, ...]
    inventory: Inventory = field(repr=False)
    marks: Marks = field(repr=False)
    superfluous: frozenset[int] = field(repr=False)

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return count(self.findings, "error")

    @property
    def warnings(self) -> int:
        """How many are warnings."""
        return count(self.findings, "warning")


def diagnose(
    data: str | Path,
    *,
    forecast: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    labels: bool = True,
    marks: str | Path | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> Report:
    """Look for what is wrong with a data set. Nothing is written but caches.

    data: as for `nearkin.train`. forecast: options of a training to forecast, `{}` for those of `nearkin train DATA`,
    None for no forecast. run: a run folder, whose network compares images; by default the pretrained one. labels:
    whether images are compared at all; if not, labels are not checked and near copies are judged by hashes and pixels.
    marks: a file as for `nearkin.doctor.table.read_marks`; images that it leaves out are in no finding, and others have
    the labels that it gives; the forecast is of the data as they are. quiet: nothing on stderr.

    Every image is decoded once. Raises DataError when the data or the marks cannot be read, ModelError for a run
    without a model, ConfigError for options that do not fit.
    """
    exit_if_importing_main()
    given = {"device": device, **(forecast or {})}
    config = None if forecast is None else checked_forecast(str(data), given)
    listing = resolve(str(data))
    chosen = choose(listing, channels="auto", val_split=0.0, seed=0, images_per_class=None)
    inventory = Inventory.of(chosen)
    marked = Marks() if marks is None else _marks(Path(marks), str(data), inventory)
    outlook = [] if config is None else list(objective_findings(listing, config))
    inventory = inventory.relabelled(marked.labels)
    findings = [*class_findings(inventory.without(marked.out)), *folder_findings(listing)]
    seen = scan(inventory, quiet=quiet)
    if count(findings, "error") or not seen.readable.any():  # then it is told why
        outlook = [replace(e, level="ok") if e.level == "error" else e for e in outlook]
    described = None
    if labels and seen.readable.any():
        # With the marked images: the features of a whole split are kept for the next time.
        place = None if run is None else Path(run)
        described = describe(inventory, listing, seen, run=place, device=device, quiet=quiet)
    remaining = seen.without(marked.out)
    findings += quality_findings(inventory, remaining)
    compared, out = _compared(inventory, seen, remaining, described)
    findings += (*compared, *outlook)
    return Report(str(data), tuple(findings), inventory, marked, out | set(remaining.reasons))


def _compared(
    inventory: Inventory, seen: Scan, remaining: Scan, described: Described | None
) -> tuple[list[Finding], frozenset[int]]:
    """Findings of images that are compared with each other, and the copies to leave out. described: features of all
    images of `seen` that can be read."""
    features = None
    if described is not None:
        features = np.zeros((len(seen.height), described.features.shape[1]), np.float32)
        features[seen.readable] = described.features.cpu().numpy()
    exact, near = find_copies(
        remaining,
        None if described is None or described.source == "pixels" else features,
        lambda rows: pixel_features(inventory, rows).numpy(),
    )
    findings = list(copy_findings(inventory, exact, near))
    if described is not None and features is not None:
        disputed = contradicting(inventory, exact) | contradicting(inventory, near)
        rows = np.setdiff1d(np.flatnonzero(remaining.readable), list(disputed))
        chosen = torch.from_numpy(features[rows])
        findings += label_findings(inventory, chosen, rows, described.source)
    return findings, frozenset(superfluous(inventory, exact) | superfluous(inventory, near))


def _marks(path: Path, data: str, inventory: Inventory) -> Marks:
    if not inventory.from_files:
        raise ConfigError(f"{printable(data)} are no files, so that none can be marked.")
    return read_marks(path, inventory)
