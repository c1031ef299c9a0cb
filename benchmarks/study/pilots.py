"""Cheap pilots of the study: one seed, many settings, judged by held-out images (see `benchmarks.search`).

    NEARKIN_BENCH_STUDY=FOLDER python -m benchmarks.study.pilots [NAME ...]

Each run is one row of docs/data/study-pilots.csv. The settings `cone, ...` are the hypotheses about CoNe; those whose
options begin with `--trust` change its neighbour term in ways that nearkin has no option for:

- teacher: the term of an anchor is multiplied by the share of its class in its target, without a gradient;
- mean: all are multiplied by the running mean of that share;
- threshold: there is no neighbour term until that mean passes 0.3.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.search import Cell, Search
from benchmarks.study.pieces import SCRATCH
from nearkin.functional import PerAnchor
from nearkin.objectives import cone

RESULTS = Path("docs/data/study-pilots.csv")
SMALL = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SCRATCH.items())
SMALL = SMALL.replace("--from-scratch True", "--from-scratch") + " --threads 1 --workers 0"
CELLS = {
    "tiny-imagenet100, 50 per class": Cell(
        "tiny-imagenet100", 50, f"{SMALL} --batch-size 64 --epochs 60"
    ),
    "cifar10, 400 per class": Cell("cifar10", 400, f"{SMALL} --batch-size 64 --epochs 60"),
}
FEW = "cifar10, 50 per class"  # 400 crops of each image through the student in every run
FEW_CELL = Cell(
    "cifar10",
    50,
    "--from-scratch --model test_resnet --image-size 32 --batch-size 64 --threads 1 --workers 0",
)
CONE, OWN = "--objective cone", "--objective cone --objective.teacher-crop own"
SETTINGS = {
    "ce": "--objective ce",
    "ce, smoothing 0.1": "--objective ce --objective.smoothing 0.1",
    "ce, averaged weights": "--objective ce --ema 0.998",
    "supcon": "--objective supcon",
    "cone": CONE,
    "cone, no neighbour term": f"{CONE} --objective.neighbour-weight 0",
    "cone, own crop, consistency 1": f"{OWN} --objective.consistency-weight 1",
    "cone, own crop, consistency 1, no neighbour term": (
        f"{OWN} --objective.consistency-weight 1 --objective.neighbour-weight 0"
    ),
    "cone, times the anchor's share": f"--trust teacher {CONE}",
    "cone, times the mean share": f"--trust mean {CONE}",
    "cone, from a mean share of 0.3": f"--trust threshold {CONE}",
    "cone, lr by the sum of weights": f"{CONE} --lr 0.024",
    "cone, the whole set in the bank": f"{CONE} --objective.bank 5000",
    "cone, classifier on the features": f"{CONE} --objective.classifier features",
}
# Stage one of `attract-repulse` reads two crops of an image, stage two one: 235 epochs are 400 crops.
STRONG = "--augment strong --epochs 400"
TWO_STAGES = "--objective attract-repulse --epochs 235"
FEW_SETTINGS = {
    "ce, light": "--objective ce --epochs 400",
    "ce, strong": f"--objective ce {STRONG}",
    "ce, strong, averaged weights": f"--objective ce {STRONG} --ema 0.998",
    "sce, strong": f"--objective sce {STRONG}",
    "attract-repulse": TWO_STAGES,
    "its stage one alone": "--objective attract-repulse --epochs 165 --objective.contrast-share 0.995",
    "stage one with all crops": (
        "--objective attract-repulse --epochs 200 --objective.contrast-share 0.995"
    ),
    "no repulse": f"{TWO_STAGES} --objective.repulse 0 --objective.repulse-end 0",
    "no consistency": f"{TWO_STAGES} --objective.consistency 0",
    "teacher of 20 epochs": f"{TWO_STAGES} --objective.teacher-horizon 20",
    "second stage at lr 0.5": f"{TWO_STAGES} --objective.teacher-lr 0.5",
    "second stage at lr 0.5, teacher of 20 epochs": (
        f"{TWO_STAGES} --objective.teacher-lr 0.5 --objective.teacher-horizon 20"
    ),
    "consistency 5": f"{TWO_STAGES} --objective.consistency 5",
    "light": f"{TWO_STAGES} --augment light",
}
THRESHOLD, MOMENTUM = 0.3, 0.99


class Trust:
    """A factor of the neighbour term, from the share of the anchors' own classes in their targets."""

    def __init__(self, kind: str) -> None:
        self.kind, self.mean = kind, 0.0

    def factor(self, share: Tensor) -> Tensor | float:
        """share: `[N]`."""
        self.mean += (1 - MOMENTUM) * (float(share.mean()) - self.mean)
        factors: dict[str, Tensor | float] = {
            "teacher": share,
            "mean": self.mean,
            "threshold": float(self.mean > THRESHOLD),
        }
        return factors[self.kind]

    def around(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """`bank_attention` with the factor."""

        def changed(query: Tensor, key: Tensor, labels: Tensor, *rest: Any, **options: Any) -> Any:
            (value, valid), target = attention(query, key, labels, *rest, **options)
            share = target.detach().gather(1, labels[:, None])[:, 0].to(value.dtype)
            return PerAnchor(value * self.factor(share), valid), target

        return changed


def main() -> None:
    wanted = [(cell, name) for cell in CELLS for name in SETTINGS]
    wanted += [(FEW, name) for name in FEW_SETTINGS]
    names = sys.argv[1:] or [*SETTINGS, *FEW_SETTINGS]
    root = Path(os.environ["NEARKIN_BENCH_STUDY"])
    cells, settings = CELLS | {FEW: FEW_CELL}, SETTINGS | FEW_SETTINGS
    search = Search(RESULTS, root, cells, settings, "benchmarks.study.pilots")
    search.make([job for job in wanted if job[1] in names])


def _train(words: list[str]) -> int:
    """`nearkin train` with `--trust KIND`."""
    from nearkin.cli import run
    from nearkin.cli.streams import prepare_streams

    prepare_streams()
    if "--trust" in words:
        place = words.index("--trust")
        cone.bank_attention = Trust(words[place + 1]).around(cone.bank_attention)  # type: ignore[attr-defined]
        words = words[:place] + words[place + 2 :]
    return run(words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(_train(sys.argv[1:]))
    main()
