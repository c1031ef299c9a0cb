"""The table of docs/loss-values.md: what each term of each objective is at chance and at collapse.

    python -m benchmarks.loss_values

Ten classes, a batch of 80 images, 8 of each class, options as from scratch, and banks of 80 earlier images, 8 of each
class. At chance all logits are equal and all embeddings stand at right angles, as random directions in many dimensions
do. At collapse all logits are equal and all embeddings are the same.
"""

from __future__ import annotations

from typing import Any

import torch

from nearkin.objectives import Objective, Stage, get
from nearkin.types import Batch, Loss, Outputs, Progress

CLASSES, EACH = 10, 8
IMAGES = CLASSES * EACH
DIM = 6 * IMAGES
# The whole bank counts: at chance all entries are as near, and a choice among them would be arbitrary.
OPTIONS: dict[str, dict[str, Any]] = {
    "cone": {"warmup_steps": 0, "bank": IMAGES, "topk": IMAGES, "bank_precision": "exact"},
    "gpaco": {"bank": IMAGES},
}


def values(name: str) -> dict[str, tuple[float, float]]:
    """By term, its values at chance and at collapse in the objective's first stage."""
    kind = get(name)
    own = dict(OPTIONS.get(name, {}))
    own |= {"attach": "features"} if "attach" in kind.Config.model_fields else {}
    objective = kind(kind.Config(**own), dim=DIM, classes=CLASSES, images=1000, batch_size=IMAGES)
    stage = objective.stages()[0]
    progress = Progress(stage.name, 0, 100, 0, 10)
    labels = torch.arange(IMAGES) % CLASSES
    earlier = _outputs(objective, stage, 2 * IMAGES)
    with torch.no_grad():
        objective.update(Batch(labels, labels, torch.arange(IMAGES) + IMAGES), *earlier)
        batch = Batch(labels, labels, torch.arange(IMAGES))
        student, teacher = _outputs(objective, stage, 0)
        chance = objective(batch, student, teacher, progress)
        collapse = objective.at_collapse(batch, student, teacher, progress)
    return {term: (_of(chance, term), _of(collapse, term)) for term in chance.terms}


def _outputs(objective: Objective, stage: Stage, first: int) -> tuple[Outputs, Outputs | None]:
    """Of student and teacher: rows of the unit matrix from row `first` on, and logits 0."""
    rows = torch.eye(DIM)[first:]
    count = stage.student_views * IMAGES
    number = torch.zeros(count, 2)
    if "scale" in objective.heads:
        number = objective.heads["scale"].module(torch.zeros(count, DIM)).detach()
    student = rows[:count]
    keys = rows[count : count + IMAGES]
    teacher = Outputs(keys, keys, keys, torch.zeros(len(keys), CLASSES))
    logits = torch.zeros(count, CLASSES)
    made = Outputs(student, student, student, logits, number)
    return made, teacher if stage.teacher else None


def _of(loss: Loss, term: str) -> float:
    return round(float(loss.terms[term]), 4) + 0.0  # no -0


def table() -> list[str]:
    """Lines `| objective | term | chance | collapse |`."""
    names = sorted(n for n, k in Objective.registry.items() if k.__module__.startswith("nearkin."))
    return [
        f"| `{name}` | `{term}` | {chance:.3f} | {collapse:.3f} |"
        for name in names
        for term, (chance, collapse) in values(name).items()
    ]


if __name__ == "__main__":
    print("\n".join(table()))
