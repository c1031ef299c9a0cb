"""Plain fine-tuning, the peer of `benchmarks.photos`: all layers, cross-entropy, AdamW, a cosine, nothing else.

The same packaged weights, images, splits, crops and side as nearkin's default. Five learning rates are tried with a
fifth of the time each; the one with the best validation accuracy then gets the whole time, so that the peer has twice
the time in all. The last epoch counts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

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
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


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


def trained(data: Dataset, rate: float, seconds: float, seed: int, workers: int) -> nn.Module:
    """As many epochs as fit into the seconds, by the time of the first steps."""
    torch.manual_seed(seed)
    network = Classifier(len(data.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05, fused=True)
    split = data.splits["train"]
    size = min(BATCH, len(split.labels))
    transform = train_transform(TrainSpec.of("light", image_size=SIDE, channels=3, flip=True))
    draw = drawing("shuffle", split.labels, seed=seed, batch_size=size, per_class=4, repeats=1)
    began, steps = time.monotonic(), 10
    per_epoch = len(split.labels) // size
    order = TrainOrder(
        len(split.labels), seed=seed, batch_size=size, first=0, last=10**6, rank=0, world_size=1,
        draw=draw,
    )  # fmt: skip
    network.train()
    batches = train_loader(split, transform, order, views=1, seed=seed, workers=workers)
    for step, batch in enumerate(batches):
        if step == 10:
            each = (time.monotonic() - began) / 10
            steps = max(1, int(seconds / each / per_epoch)) * per_epoch
        if step >= max(10, steps):
            break
        part = min(1.0, step / max(steps, 11))
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * part)) if step >= 10 else rate / 10
        loss = nn.functional.cross_entropy(network(batch.images[0]), batch.labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module, split: Split, workers: int) -> float:
    """Top-1 of the evaluation transform."""
    network.eval()
    views = tta_views("none", EvalSpec.for_size(SIDE, 3, 0.875))
    rows, hits = range(len(split.labels)), 0
    for batch in eval_loader(split, views, rows, batch_size=64, workers=workers):
        hits += int((network(batch.images[0]).argmax(1) == batch.labels).sum())
    return hits / len(split.labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plain_finetuning")
    parser.add_argument("data", type=Path)
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    keep_freed_memory()
    data = load_dataset(str(given.data), images_per_class=given.images_per_class, seed=given.seed)
    seconds = 60 * given.minutes
    found: dict[float, float] = {}
    for rate in RATES:
        network = trained(data, rate, seconds / 5, given.seed, given.workers)
        found[rate] = accuracy(network, data.splits["val"], given.workers)
    best = max(found, key=found.__getitem__)
    network = trained(data, best, seconds, given.seed, given.workers)
    result: dict[str, Any] = {
        "test_top1": accuracy(network, data.splits["test"], given.workers),
        "val_top1": accuracy(network, data.splits["val"], given.workers),
        "lr": best,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
