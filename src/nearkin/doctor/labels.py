"""Findings about labels that the neighbours of an image contradict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from nearkin.doctor.findings import Finding
from nearkin.doctor.inventory import Inventory
from nearkin.errors import counted, printable
from nearkin.evaluation.suspects import NEIGHBOURS, suspects


def label_findings(
    inventory: Inventory, features: Tensor, rows: np.typing.NDArray[np.int64], source: str
) -> Iterator[Finding]:
    """One finding with the suspicious labels, the most suspicious first. features: `[n, d]`, of the images `rows`."""
    if len(rows) < 2 * NEIGHBOURS:
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
    some = "label is" if len(chosen) == 1 else "labels are"
    text = (
        f"{counted(len(chosen), some, some)} suspicious: the {NEIGHBOURS} most similar images have another one "
        f"({printable(source)}); look at them, the most suspicious first, and mark what is wrong"
    )
    yield Finding("warning", "suspicious-labels", text, inventory.concerned(rows[chosen], details))
