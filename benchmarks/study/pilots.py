"""Cheap pilots of the study: one seed, many settings, judged by held-out images (see `benchmarks.search`).

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study.pilots [NAME ...]

Each run is one row of docs/data/study-pilots.csv. Those whose options begin with `--change` change the
neighbour term of CoNe in ways that nearkin has no option for:

- teacher: the term of an anchor is multiplied by the share of its class in its target, without a gradient;
- mean: all are multiplied by the running mean of that share;
- threshold: there is no neighbour term until that mean passes 0.3;
- copies: an anchor's own earlier copies in the bank are neighbours like all others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.search import Cell, Search
from benchmarks.study.pieces import SCRATCH
from nearkin.functional import PerAnchor
from nearkin.objectives import cone

RESULTS = Path("docs/data/study-pilots.csv")
SMALL = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SCRATCH.items())
SMALL = SMALL.replace("--from-scratch True", "--from-scratch") + " --threads 1 --workers 0"
# The crops of an image through the student are equal in all rows of a cell: an objective that reads two gets half the
# epochs.
EPOCHS = 40
CELLS = {
    "tiny-imagenet100, 50 per class": Cell("tiny-imagenet100", 50, f"{SMALL} --batch-size 64"),
    "cifar10, 400 per class": Cell("cifar10", 400, f"{SMALL} --batch-size 64"),
}
FEW = "cifar10, 50 per class"
FEW_CELL = Cell("cifar10", 50, f"{SMALL} --batch-size 64")
CE = f"--epochs {EPOCHS} --objective ce"
PUBLISHED = (  # but for the sizes
    "--objective cone --objective.classifier embedding --objective.teacher-crop same "
    "--objective.consistency-weight 0.4 --objective.neighbour-weight 0.7"
)
CONE = f"--epochs {EPOCHS} {PUBLISHED}"  # of an option that is given twice, the last counts
OWN = f"{CONE} --objective.teacher-crop own --objective.consistency-weight 1"
FEATURES = f"{OWN} --objective.classifier features"
DEFAULT = f"--epochs {EPOCHS} --objective cone"
ALONE, TWICE = "--objective.neighbour-weight 0", "--objective.neighbour-weight 2"
SETTINGS = {
    "ce": CE,
    "ce, smoothing 0.1": f"{CE} --objective.smoothing 0.1",
    "ce, averaged weights": f"{CE} --ema 0.998",
    "ce, learning rate doubled": f"{CE} --lr 0.1",
    "ce, learning rate halved": f"{CE} --lr 0.025",
    "ce, head of cone": f"{CONE} {ALONE} --objective.consistency-weight 0",
    # The classifier reads the embedding.
    "own crop, consistency 1": OWN,
    "own crop, consistency 1, averaged weights": f"{OWN} --ema 0.998",
    # The classifier reads the features.
    "features, own crop, consistency 1": FEATURES,
    "features, own crop, consistency 1, no neighbour term": f"{FEATURES} {ALONE}",
    "features, own crop, consistency 2": f"{FEATURES} --objective.consistency-weight 2",
    "features, own crop, consistency 1, neighbour 1.5": f"{FEATURES} --objective.neighbour-weight 1.5",
    "features, own crop, consistency 1, teacher of 3 epochs": f"{FEATURES} --objective.teacher-horizon 3",
    "features, own crop, consistency 1, whole set in the bank": f"{FEATURES} --objective.bank 5000",
    # A larger weight, since a share is below 1.
    "features, own crop, consistency 1, neighbour 2, the anchor's share": f"--change teacher {FEATURES} {TWICE}",
    "features, own crop, consistency 1, neighbour 2, the mean share": f"--change mean {FEATURES} {TWICE}",
    "features, own crop, consistency 1, from a share of 0.3": f"--change threshold {FEATURES}",
    "features, own crop, consistency 1, lr doubled": f"{FEATURES} --lr 0.1",
    "features, own crop, consistency 1, lr halved": f"{FEATURES} --lr 0.025",
    # What each of its choices does, with the defaults for ten classes: 2 000 entries, 500 neighbours.
    "default": DEFAULT,
    "default, bank of 500": f"{DEFAULT} --objective.bank 500",
    "default, 32 neighbours": f"{DEFAULT} --objective.topk 32",
    "default, 128 neighbours": f"{DEFAULT} --objective.topk 128",
    "default, neighbour temperature 0.05": f"{DEFAULT} --objective.neighbour-temperature 0.05",
    "default, neighbour temperature 0.2": f"{DEFAULT} --objective.neighbour-temperature 0.2",
    "default, consistency temperature 0.035": f"{DEFAULT} --objective.consistency-temperature 0.035",
    "default, consistency temperature 0.14": f"{DEFAULT} --objective.consistency-temperature 0.14",
    "default, no consistency": f"{DEFAULT} --objective.consistency-weight 0",
    "default, teacher of 3 epochs": f"{DEFAULT} --objective.teacher-horizon 3",
    "default, teacher of 8 steps": f"{DEFAULT} --objective.teacher-horizon 0.01",
    "default, own copies": f"--change copies {DEFAULT}",
}
# Stage one of `attract-repulse` reads two crops of an image, stage two one: with a share of 0.7, 235 epochs are 400
# crops, with 0.3 it is 307.
STRONG = "--augment strong --epochs 400"
TWO_STAGES = (  # as the defaults were
    "--objective attract-repulse --augment strong --epochs 235 --objective.beta 1 --objective.repulse 1 "
    "--objective.repulse-end 0.1 --objective.contrast-share 0.7 --objective.teacher-lr 0.1 "
    "--objective.teacher-memory 0.028"
)
ONE_STAGE = f"{TWO_STAGES} --objective.contrast-share 0.995"
NO_REPULSE = "--objective.repulse 0 --objective.repulse-end 0"
# As many steps as `ce`, since a step of stage one reads two crops of an image.
STEPS = f"{TWO_STAGES} --batch-size 32 --lr 0.05"
PLAIN = f"{STEPS} --objective.beta 0 --objective.repulse 0.1 --objective.repulse-end 0"
# The second stage at the learning rate of the first, its teacher a mean of 480 steps.
WHOLE = f"{PLAIN} --objective.teacher-lr 1 --objective.teacher-memory 0.42"
EARLY = f"{WHOLE} --objective.teacher-memory 0.14 --objective.contrast-share 0.3 --epochs 307"
STRONG_CE = "--objective ce --augment strong --ema 0.998 --batch-size 32 --lr 0.05"
FEW_SETTINGS = {
    "ce, light": "--objective ce --augment light --epochs 400",
    "ce, strong": f"--objective ce {STRONG}",
    "ce, strong, averaged weights": f"--objective ce {STRONG} --ema 0.998",
    "ce, strong, averaged weights, 32 images a step": f"{STRONG_CE} --epochs 400",
    # A quarter of the crops, and 3.75 times as many.
    "ce, light, 100 crops": "--objective ce --augment light --epochs 100",
    "ce, light, 1500 crops": "--objective ce --augment light --epochs 1500",
    "ce, strong, averaged weights, 32 images a step, 100 crops": f"{STRONG_CE} --epochs 100",
    "ce, strong, averaged weights, 32 images a step, 1500 crops": f"{STRONG_CE} --epochs 1500",
    "sce, strong": f"--objective sce {STRONG}",
    "cone, strong": f"{FEATURES} {STRONG}",
    "as it was": TWO_STAGES,
    "its stage one alone": f"{ONE_STAGE} --epochs 165",
    "stage one with all crops": f"{ONE_STAGE} --epochs 200",
    "no consistency": f"{TWO_STAGES} --objective.consistency 0",
    "plain cross-entropy, no repulse": f"{TWO_STAGES} --objective.beta 0 {NO_REPULSE}",
    "32 images a step": STEPS,
    "32 images a step, plain cross-entropy, repulse 0.1": PLAIN,
    "32 images a step, plain cross-entropy, no repulse": f"{PLAIN} {NO_REPULSE}",
    "second stage at the full rate, with a long memory": WHOLE,
    "that after 0.3 of the epochs": EARLY,
    "that, 100 crops": f"{EARLY} --epochs 77",
    "that, 1500 crops": f"{EARLY} --epochs 1152",
    "that, no repulse": f"{EARLY} {NO_REPULSE}",
    "that, consistency 5": f"{EARLY} --objective.consistency 5",
    "that, beta 1 and repulse 1 to 0.1": (
        f"{EARLY} --objective.beta 1 --objective.repulse 1 --objective.repulse-end 0.1"
    ),
}
THRESHOLD, MOMENTUM = 0.3, 0.99


class Change:
    """`bank_attention`, changed."""

    def __init__(self, kind: str, attention: Callable[..., Any]) -> None:
        self.kind, self.attention, self.mean = kind, attention, 0.0

    def __call__(
        self, query: Tensor, key: Tensor, labels: Tensor, ids: Tensor, *rest: Any, **options: Any
    ) -> Any:
        """ids: `[N]` or `[N, 2]`, of the anchors' images."""
        if self.kind == "copies":
            # -1: of no image.
            return self.attention(query, key, labels, torch.full_like(ids, -1), *rest, **options)
        (value, valid), target = self.attention(query, key, labels, ids, *rest, **options)
        share = target.detach().gather(1, labels[:, None])[:, 0].to(value.dtype)
        return PerAnchor(value * self.factor(share), valid), target

    def factor(self, share: Tensor) -> Tensor | float:
        """share: `[N]`, of the anchors' own classes in their targets."""
        self.mean += (1 - MOMENTUM) * (float(share.mean()) - self.mean)
        factors: dict[str, Tensor | float] = {
            "teacher": share,
            "mean": self.mean,
            "threshold": float(self.mean > THRESHOLD),
        }
        return factors[self.kind]


def main() -> None:
    wanted = [(cell, name) for cell in CELLS for name in SETTINGS]
    wanted += [(FEW, name) for name in FEW_SETTINGS]
    names = sys.argv[1:] or [*SETTINGS, *FEW_SETTINGS]
    root = Path(os.environ["NEARKIN_BENCH_STUDY"])
    cells, settings = CELLS | {FEW: FEW_CELL}, SETTINGS | FEW_SETTINGS
    search = Search(RESULTS, root, cells, settings, "benchmarks.study.pilots")
    search.make([job for job in wanted if job[1] in names])


def _train(words: list[str]) -> int:
    """`nearkin train` with `--change KIND`."""
    from nearkin.cli import run
    from nearkin.cli.streams import prepare_streams

    prepare_streams()
    if "--change" in words:
        place = words.index("--change")
        cone.bank_attention = Change(words[place + 1], cone.bank_attention)  # type: ignore[attr-defined]
        words = words[:place] + words[place + 2 :]
    return run(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(_train(sys.argv[1:]))
    main()
