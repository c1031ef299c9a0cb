"""Findings about labels that the neighbours of an image contradict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from nearkin.doctor.findings import Finding, Level
from nearkin.doctor.inventory import Inventory
from nearkin.errors import counted, printable
from nearkin.evaluation.suspects import NEIGHBOURS, suspects

USUAL = 0.005  # share of images that look like another class in most data sets, though their label is right


def label_findings(
    inventory: Inventory, features: Tensor, rows: np.typing.NDArray[np.int64], source: str
) -> Iterator[Finding]:
    """One finding with the suspicious labels, the most suspicious first. features: `[n, d]`, of the images `rows`."""
    if len(rows) < 2 * NEIGHBOURS:
        text = f"not checked: {counted(len(rows), 'image is', 'images are')} too few, {2 * NEIGHBOURS} are the least"
        yield Finding("ok", "labels", text)
        return
    found = suspects(features, inventory.labels[rows], len(inventory.classes))
    chosen = [place for place in found.ranking.tolist() if found.suspicious[place]]
    if not chosen:
        text = f"no label is contradicted by the nearest images ({printable(source)})"
        yield Finding("ok", "labels", text)
        return
    details = {
        int(rows[place]): (
            f"rather {inventory.classes[int(found.other[place])]}: {100 * found.votes[place]:.0f} % of the nearest "
            f"images, its own class {100 * found.own[place]:.0f} %"
        )
        for place in chosen
    }
    share = len(chosen) / len(rows)
    number = counted(len(chosen), "label is", "labels are")
    text = (
        f"{number} suspicious ({100 * share:.1f} %): the {NEIGHBOURS} most similar images have another one "
        f"({printable(source)}); look, the most suspicious first, and mark what is wrong"
    )
    level: Level = "warning" if share > USUAL else "ok"
    yield Finding(level, "suspicious-labels", text, inventory.concerned(rows[chosen], details))
