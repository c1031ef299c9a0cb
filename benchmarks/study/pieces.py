"""What is compared: each piece is one call of `nearkin.compare`, small enough to run in an hour or two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nearkin.comparison.entries import parse

# 0.7 million weights, and half as fast again as the usual stem: it is narrow where the images are still whole.
SMALL = {"model": "resnet10t", "model.channels": "[16,48,96,192]", "model.stem_width": "8"}
# Float32 on every device, so that the pieces can be made on any.
SCRATCH = {"from_scratch": True, "image_size": 32, "precision": "fp32", **SMALL}
# What photos get without a GPU.
PHOTO = {"image_size": 160, "eval_size": 192, "precision": "fp32"}


class Piece(NamedTuple):
    """question: that it answers. data: folder under NEARKIN_BENCH_STUDY. objectives: as for `--objectives`. options:
    of every run."""

    question: str
    data: str
    objectives: str
    options: dict[str, Any]


# `ce` smooths its labels by 0.1 in fine-tuning (docs/defaults.md), so `ce+ls` would be the same.
TUNED = "ce,ce+ema,supcon,supcon:weight=1,sincere,cone,schane:mix=0.5:views=1:temperature=0.1"
TRAINED = "ce,ce+ls,ce+ema,supcon,gpaco,cone,cone:neighbour_weight=0"
FEW = "ce,ce+ema,attract-repulse:contrast_share=0.3:teacher_lr=1"
STRONG = {"augment": "strong", "batch_size": 32, "lr": 0.05, "val_split": 0.0, **SCRATCH}
PIECES: dict[str, Piece] = {
    # Fine-tuning of packaged ImageNet weights.
    "tune-grocery-1": Piece(
        "Which objective helps with 1 image a class, from ImageNet weights?",
        "grocery81",
        TUNED,
        {"images_per_class": 1, "epochs": 60, **PHOTO},
    ),
    "tune-grocery-5": Piece(
        "Which objective helps with 5 images a class, from ImageNet weights?",
        "grocery81",
        f"{TUNED},ce:smoothing=0,sigsup",
        {"images_per_class": 5, "epochs": 20, **PHOTO},
    ),
    "tune-grocery-20": Piece(
        "Which objective helps with 20 images a class, from ImageNet weights?",
        "grocery81",
        TUNED,
        {"images_per_class": 20, "epochs": 9, **PHOTO},
    ),
    "tune-grocery-all": Piece(
        "Which objective helps with all 2 640 images, from ImageNet weights?",
        "grocery81",
        TUNED,
        {"epochs": 7, **PHOTO},
    ),
    "tune-clothing": Piece(
        "Which objective helps on photographs of clothes, from ImageNet weights?",
        "clothing10",
        TUNED,
        {"epochs": 6, **PHOTO},
    ),
    # From scratch, few images, strong augmentation, 400 crops of each image; the last epoch gives the model.
    "few-cifar": Piece(
        "Which objective helps from scratch, with 50 images of each of 10 classes, trained long?",
        "cifar10-without-val",  # whose 5 000 are ten times the training images
        FEW,
        {"images_per_class": 50, "epochs": 400, **STRONG},
    ),
    "few-fashion": Piece(
        "Which objective helps from scratch, with 50 grey images of each of 10 kinds of clothes, trained long?",
        "fashion-mnist",
        FEW,
        {"images_per_class": 50, "epochs": 400, **STRONG},
    ),
    # From scratch, long enough to overfit.
    "scratch-cifar-4000": Piece(
        "Which objective helps from scratch, with 4 000 images of 10 classes?",
        "cifar10",
        TRAINED,
        {"images_per_class": 400, "epochs": 40, "batch_size": 64, "val_split": 0.1, **SCRATCH},
    ),
    "scratch-cifar-20000": Piece(
        "Which objective helps from scratch, with 20 000 images of 10 classes?",
        "cifar10",
        TRAINED,
        {"images_per_class": 2000, "epochs": 16, "batch_size": 128, **SCRATCH},
    ),
    "scratch-fashion-2000": Piece(
        "Which objective helps from scratch, with 2 000 grey images of 10 kinds of clothes?",
        "fashion-mnist",
        TRAINED,
        {"images_per_class": 200, "epochs": 60, "batch_size": 64, **SCRATCH},
    ),
    "scratch-tiny-10000": Piece(
        "Which objective helps from scratch, with 10 000 images of 100 classes?",
        "tiny-imagenet100",
        TRAINED,
        {"images_per_class": 100, "epochs": 25, "batch_size": 64, **SCRATCH},
    ),
}


def finished_runs(root: Path, name: str) -> Iterator[tuple[str, int, Path]]:
    """Entry, seed and run folder of the finished runs of a piece, entry by entry. root: NEARKIN_BENCH_STUDY."""
    for entry in parse(PIECES[name].objectives.split(",")):
        for run in sorted((root / "runs" / name / "runs").glob(f"{entry.folder}-seed*")):
            if (run / "model.safetensors").exists():
                yield entry.name, int(run.name.rpartition("-seed")[2]), run
