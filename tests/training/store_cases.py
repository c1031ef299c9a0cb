"""Snapshots of every kind of tensor, and what the tests of the store ask of them."""

from __future__ import annotations

from pathlib import Path

import torch

from nearkin.training.checkpoint.snapshot import Snapshot
from nearkin.training.checkpoint.store import Store

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def snapshot(step: int, best: int | None = None) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    draw = torch.randn(3, 5, generator=generator)
    model = {f"float.{dtype}": draw.to(dtype) for dtype in FLOATS}
    model |= {f"integer.{dtype}": (draw * 50).to(dtype).abs() for dtype in INTEGERS}
    model |= {"bool": draw > 0, "scalar": torch.tensor(step), "empty": torch.empty(0, 7)}
    state = {"rng": [1, 2**127], "lr": 0.1 + step, "name": "ünï\udcff", "best": {"step": best}}
    return Snapshot(step, {"model": model, "bank": {"keys": draw.t()}}, state)


def saved(folder: Path, *steps: int) -> Store:
    store = Store(folder)
    for step in steps:
        store.save(snapshot(step))
    return store


def assert_same(actual: Snapshot | None, expected: Snapshot) -> None:
    assert actual is not None
    assert (actual.step, actual.state) == (expected.step, expected.state)
    assert actual.tensors.keys() == expected.tensors.keys()
    for stem, tensors in expected.tensors.items():
        assert actual.tensors[stem].keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = actual.tensors[stem][name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert found.contiguous().view(-1).view(torch.uint8).tolist() == (
                tensor.contiguous().view(-1).view(torch.uint8).tolist()
            ), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unexpected(text: str) -> None:
    raise AssertionError(f"warned without a reason: {text}")
