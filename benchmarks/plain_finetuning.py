"""Plain fine-tuning, the peer of `benchmarks.photos`: all layers, cross-entropy, AdamW, a cosine, nothing else.

The same packaged weights, images, splits, crops and side as nearkin's default. The budget is processor time of one
thread, so that other work on the machine costs no steps; 25 minutes are what the default uses, whole processes on two
cores, in `benchmarks.photos`. Five learning rates are tried with a tenth of the budget each; the one with the best
validation accuracy then gets the whole of it. The last epoch counts, evaluated at 160 or 192 px, whichever is better on
validation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from nearkin.data.dataset import Dataset, Split, load_dataset
from nearkin.data.loader import eval_loader, train_loader
from nearkin.data.sampling import TrainOrder, drawing
from nearkin.data.transforms import EvalSpec, TrainSpec, train_transform
from nearkin.evaluation.tta import tta_views
from nearkin.network import build_backbone
from nearkin.process import keep_freed_memory

MODEL, SIDE, BATCH = "tf_efficientnet_lite0", 160, 32
SIDES = (160, 192)  # of evaluation
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
TRIAL = 0.1  # of the budget
FIRST, TIMED = 2, 10  # steps that are not timed, and those that are


class Classifier(nn.Module):
    """The network with normalised pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        backbone = build_backbone(
            MODEL, pretrained=True, channels=3, image_size=SIDE, stem="auto", drop_path=0.0
        )
        self.body, self.head = backbone.module, nn.Linear(backbone.dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        logits: Tensor = self.head(self.body(pixels))
        return logits


def trained(data: Dataset, rate: float, seconds: float, seed: int) -> tuple[nn.Module, int]:
    """The network after as many epochs as fit into the seconds of processor time, and their number; at least one."""
    torch.manual_seed(seed)
    network = Classifier(len(data.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05, fused=True)
    split = data.splits["train"]
    size = min(BATCH, len(split.labels))
    transform = train_transform(TrainSpec.of("light", image_size=SIDE, channels=3, flip=True))
    draw = drawing("shuffle", split.labels, seed=seed, batch_size=size, per_class=4, repeats=1)
    per_epoch, steps = len(split.labels) // size, FIRST + TIMED
    order = TrainOrder(
        len(split.labels), seed=seed, batch_size=size, first=0, last=10**6, rank=0, world_size=1,
        draw=draw,
    )  # fmt: skip
    network.train()
    began, measured = 0.0, False
    for step, batch in enumerate(
        train_loader(split, transform, order, views=1, seed=seed, workers=0)
    ):
        if step == FIRST:
            began = time.process_time()
        if step == FIRST + TIMED:
            each = (time.process_time() - began) / TIMED
            steps, measured = max(1, round(seconds / each / per_epoch)) * per_epoch, True
        if step >= steps:
            break
        # The first steps warm the learning rate up: the end of the cosine is not known yet.
        factor = 0.5 * (1 + math.cos(math.pi * step / steps)) if measured else (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = nn.functional.cross_entropy(network(batch.images[0]), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return network, steps // per_epoch


@torch.no_grad()
def accuracy(network: nn.Module, split: Split, side: int) -> float:
    """Top-1 of the evaluation transform."""
    network.eval()
    views = tta_views("none", EvalSpec.for_size(side, 3, 0.875))
    rows, hits = range(len(split.labels)), 0
    for batch in eval_loader(split, views, rows, batch_size=64, workers=0):
        hits += int((network(batch.images[0]).argmax(1) == batch.labels).sum())
    return hits / len(split.labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_finetuning")
    parser.add_argument("data", type=Path)
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--minutes", type=float, default=25.0, help="processor time of training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    data = load_dataset(str(given.data), images_per_class=given.images_per_class, seed=given.seed)
    val, seconds = data.splits["val"], 60 * given.minutes
    tried: dict[float, float] = {}
    for rate in RATES:
        network, epochs = trained(data, rate, TRIAL * seconds, given.seed)
        tried[rate] = accuracy(network, val, SIDE)
        print(f"lr {rate:g}: {epochs} epochs, {tried[rate]:.4f} on validation", file=sys.stderr)
    best = max(tried, key=tried.__getitem__)
    network, epochs = trained(data, best, seconds, given.seed)
    found = {side: accuracy(network, val, side) for side in SIDES}
    side = max(found, key=found.__getitem__)
    result = {
        "test_top1": accuracy(network, data.splits["test"], side),
        "val_top1": found[side],
        "detail": f"lr {best:g}, {epochs} epochs, evaluated at {side} px",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
