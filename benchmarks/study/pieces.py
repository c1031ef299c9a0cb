"""What is compared: each piece is one call of `nearkin.compare`, small enough to run in an hour or two."""

from __future__ import annotations

from typing import Any, NamedTuple

SMALL = {"model": "resnet10t", "model.channels": "[24,48,96,192]", "model.stem_width": "16"}
SCRATCH = {"from_scratch": True, "image_size": 32, **SMALL}


class Piece(NamedTuple):
    """question: that it answers. data: folder under NEARKIN_BENCH_STUDY. objectives: as for `--objectives`. options:
    of every run. seeds: at least 3 for a verdict; pilots have 1 and are judged on validation only."""

    question: str
    data: str
    objectives: str
    seeds: int
    options: dict[str, Any]


RIVALS = "ce,ce+ls,ce+ema"
PIECES: dict[str, Piece] = {
    # Fine-tuning of packaged ImageNet weights.
    "tune-grocery-5": Piece(
        "Which objective helps with 5 images a class, from ImageNet weights?",
        "grocery81",
        # `ce` smooths its labels by 0.1 here (docs/defaults.md), so `ce+ls` would be the same.
        "ce,ce:smoothing=0,ce+ema,supcon,supcon:weight=1,sincere,cone,sigsup,"
        "schane:mix=0.5:views=1:temperature=0.1",
        3,
        {"images_per_class": 5, "epochs": 20},
    ),
    "tune-grocery-20": Piece(
        "The same with 20 images a class",
        "grocery81",
        "ce,ce+ema,supcon,supcon:weight=1,cone,schane:mix=0.5:views=1:temperature=0.1",
        3,
        {"images_per_class": 20, "epochs": 9},
    ),
    "tune-grocery-all": Piece(
        "The same with all 2 640 images",
        "grocery81",
        "ce,ce+ema,supcon,supcon:weight=1,cone,schane:mix=0.5:views=1:temperature=0.1",
        3,
        {"epochs": 7},
    ),
    "tune-clothing": Piece(
        "The same on photographs of clothes",
        "clothing10",
        "ce,ce+ema,supcon,supcon:weight=1,cone,schane:mix=0.5:views=1:temperature=0.1",
        3,
        {"epochs": 6},
    ),
    # From scratch, long enough to overfit.
    "scratch-cifar-4000": Piece(
        "Does CoNe gain with the teacher's own crop and a stronger consistency, and is it more than smoothing?",
        "cifar10",
        f"{RIVALS},supcon,cone,cone:teacher_crop=own:consistency_weight=1,"
        "cone:teacher_crop=own:consistency_weight=1:neighbour_weight=0",
        3,
        {"images_per_class": 400, "epochs": 120, "batch_size": 64, "val_split": 0.1, **SCRATCH},
    ),
    "scratch-tiny-10000": Piece(
        "The same with 100 classes",
        "tiny-imagenet100",
        f"{RIVALS},supcon,cone,cone:teacher_crop=own:consistency_weight=1,"
        "cone:teacher_crop=own:consistency_weight=1:neighbour_weight=0",
        3,
        {"images_per_class": 100, "epochs": 100, "batch_size": 128, **SCRATCH},
    ),
}
