"""Reports of synthetic runs, for the tests of their page."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch.nn.functional import normalize

from nearkin.data.dataset import Split
from nearkin.evaluation.kin import Kin
from nearkin.evaluation.metrics import reduced
from nearkin.evaluation.report_data import ReportData, Seen, gather
from nearkin.report.run import Before, Facts

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><!--<script>{{7*7}}\u202egnp\x1b[31m\n\udcff,"


class Pictures:
    """Random images of one size with given names."""

    from_files, channels = False, 3

    def __init__(self, names, side=8, seed=0):
        self.names, self.side, self.seed = list(names), side, seed

    def __len__(self):
        return len(self.names)

    def name(self, row):
        return self.names[row]

    def identities(self):
        return (repr(name).encode() for name in self.names)

    def read(self, row):
        generator = torch.Generator().manual_seed(self.seed + row)
        shape = (3, self.side, self.side)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def report_data(
    evaluated=40,
    trained=60,
    classes=("ant", "bee", "cat", "dog"),
    *,
    names="{}/{}.jpg",
    side=8,
    errors=0.2,
    flipped=2,
    temperature=1.5,
    neighbours=20,
    with_tsne=False,
    split="test",
    **options,
) -> ReportData:
    """names: a pattern with places for the split and the number. flipped: wrong labels among the training images."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    number = len(classes)
    centres = normalize(torch.randn(number, 16, generator=generator), dim=1)

    def near(labels, spread):
        noise = torch.randn(len(labels), 16, generator=generator)
        return normalize(centres[torch.from_numpy(labels)] + spread * noise, dim=1)

    train_labels, labels = np.arange(trained) % number, np.arange(evaluated) % number
    keys = near(train_labels, 0.1)
    if flipped:
        train_labels[:flipped] = (train_labels[:flipped] + 1) % number
    train = Split("train", Pictures(names.format("train", k) for k in range(trained)), train_labels)
    train = train._replace(classes=tuple(classes))
    pictures = Pictures((names.format(split, k) for k in range(evaluated)), side, 1000)
    wrong = np.flatnonzero(rng.random(evaluated) < errors)
    said = labels.copy()
    said[wrong] = (labels[wrong] + 1) % number
    logits = torch.nn.functional.one_hot(torch.from_numpy(said), number) * 3.0
    logits = logits + torch.rand(evaluated, number, generator=generator)
    kin = Kin(
        keys,
        torch.from_numpy(train_labels),
        tuple(train.images.names),
        0.1,
        neighbours,
        torch.linspace(0, 0.5, 20),
        torch.linspace(0, 1, 20),
    )
    part = Split(split, pictures, labels, tuple(classes))
    seen = Seen(part, np.arange(evaluated), near(said, 0.2), logits.softmax(1))
    predictions = reduced(seen.probabilities, torch.from_numpy(labels), torch.arange(evaluated))
    return gather(predictions, seen, kin, train, temperature, with_tsne=with_tsne, **options)


def facts(data: ReportData, run="runs/photos", before=True) -> Facts:
    rows = range(data.images.evaluated)
    right = {
        data.images.names[row]: bool(data.images.labels[row] == data.images.predicted[row])
        for row in rows
    }
    lines = [
        {"kind": "validation", "stage": "probe", "step": 0, "epoch": 0, "value": 0.7, "top1": 0.7}
    ]
    for step in range(1, 30):
        terms = {"loss": 2 / step, "ce": 1 / step, "neighbour": 1 / step}
        lines.append({"kind": "train", "stage": "all", "step": step, "epoch": 0} | terms)
    for step in (10, 20, 30):
        found = {"value": 0.7 + step / 200, "top1": 0.7 + step / 200}
        lines.append({"kind": "validation", "stage": "all", "step": step, "epoch": 0} | found)
    return Facts(
        run=run,
        lines=tuple(lines),
        right=right,
        options={"data": "photos", "objective": "cone", "model": "resnet10t", "epochs": 3},
        environment={"command": "nearkin train photos", "packages": {"nearkin": "0.1"}},
        before=Before("runs/earlier", dict.fromkeys(right, True)) if before else None,
    )


@cache
def small() -> ReportData:
    return report_data()


def hostile() -> ReportData:
    classes = [f"{HOSTILE}{k}" for k in range(4)]
    return report_data(classes=classes, names=HOSTILE + "/{}/{}" + HOSTILE)


def many_classes() -> ReportData:
    return report_data(300, 400, [f"a class of things with number {k:03}" for k in range(120)])
