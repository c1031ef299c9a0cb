"""Pairwise losses at 4 096 x 128, forward and backward, in units of three matrix products."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.bench import MOST, Call, Row, Table, alternate, extra_memory, ratio
from nearkin import functional as F
from nearkin.functional import _pairs as pairs

SAMPLES, DIM, CLASSES, TEMPERATURE = 4096, 128, 100, 0.1
Loss = Callable[[Tensor, Tensor], F.PerAnchor]

LOSSES: dict[str, Loss] = {
    "SupCon (out)": lambda z, y: F.supcon_out(z, y, temperature=TEMPERATURE),
    "SupCon (in)": lambda z, y: F.supcon_in(z, y, temperature=TEMPERATURE),
    "SCHaNe, hardness 1": lambda z, y: F.schane(z, y, temperature=TEMPERATURE, hardness=1.0),
    "SCHaNe, hardness 0.7": lambda z, y: F.schane(z, y, temperature=TEMPERATURE, hardness=0.7),
    "SINCERE": lambda z, y: F.sincere(z, y, temperature=TEMPERATURE),
}
UNITS = dict(zip(LOSSES, (1.2, 1.2, 1.4, 1.8, 1.5), strict=True))
LIMITS = dict(zip(LOSSES, (0.93, 0.93, 0.94, 1.3, 1.0), strict=True))


def batch(samples: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(samples, DIM, generator=draw), dim=1)
    return features, torch.randint(CLASSES, (samples,), generator=draw)


def step(loss: Loss, features: Tensor, labels: Tensor) -> None:
    torch.autograd.backward(F.mean_valid(loss(features.clone().requires_grad_(), labels)))


def products(features: Tensor, buffer: Tensor) -> None:
    for _ in range(3):
        torch.mm(features, features.T, out=buffer)


def plain(loss: Loss, features: Tensor, labels: Tensor) -> None:
    """The same function from N x N matrices with autograd, on any device."""
    before = pairs.LARGE, pairs.LARGE_ON_GPU
    pairs.LARGE = pairs.LARGE_ON_GPU = len(features) + 1
    try:
        step(loss, features, labels)
    finally:
        pairs.LARGE, pairs.LARGE_ON_GPU = before


def peer(features: Tensor, labels: Tensor) -> Call | None:
    """pytorch-metric-learning's SupConLoss, if it is installed."""
    try:
        losses = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError:
        return None
    loss = losses.SupConLoss(temperature=TEMPERATURE)
    return lambda: loss(features.clone().requires_grad_(), labels).backward()


def slower_ways(features: Tensor, labels: Tensor) -> list[Row]:
    """In rounds of their own, because they take ten times as long as ours."""
    loss = LOSSES["SupCon (out)"]
    calls: dict[str, Call] = {
        "ours": partial(step, loss, features, labels),
        "plain": partial(plain, loss, features, labels),
    }
    other = peer(features, labels)
    if other is not None:
        calls["peer"] = other
    seconds = alternate(calls)
    rows = [ratio(seconds, "ours", "plain", "SupCon against N x N matrices", 5, True, 6.8)]
    name = "SupCon against pytorch-metric-learning 2.9"
    if other is None:
        return [*rows, Row(f"{name}: not installed (--group bench)", float("nan"))]
    return [*rows, ratio(seconds, "ours", "peer", name, 7, True, 9)]


def prepared(loss: Loss, samples: int) -> Callable[[], Call]:
    return lambda: partial(step, loss, *batch(samples))


PEAK = {f"{name} {n}": prepared(loss, n) for name, loss in LOSSES.items() for n in (SAMPLES, 32768)}


def table() -> Table:
    features, labels = batch(SAMPLES)
    ours = {name: partial(step, loss, features, labels) for name, loss in LOSSES.items()}
    unit = partial(products, features, torch.empty(SAMPLES, SAMPLES))
    seconds = alternate({"unit": unit, **ours}, most=MOST)
    rows = [ratio(seconds, n, "unit", n, UNITS[n], limit=LIMITS[n]) for n in LOSSES]
    rows += slower_ways(features, labels)
    for name in LOSSES:
        goal = (48, 17) if "SupCon" in name else (None, None)
        rows.append(extra_memory("pairwise", f"{name} {SAMPLES}", f"{name}, extra memory", *goal))
    rows += [
        extra_memory("pairwise", f"{n} 32768", f"{n}, 32 768 anchors, extra memory", 400, 163)
        for n in LOSSES
    ]
    setting = (
        f"N = {SAMPLES}, d = {DIM}, {CLASSES} classes, temperature {TEMPERATURE}, {torch.get_num_threads()} threads; "
        "unit = 3 x torch.mm(z, z.T, out=buffer); forward + backward"
    )
    return Table("Pairwise losses", setting, rows)
