"""Batches reach the device; on a GPU beside the step before. No GPU is needed: streams are acted."""

from contextlib import contextmanager

import pytest
import torch

from nearkin.training.step import Transfer
from nearkin.types import Batch


def test_a_batch_stays_as_it_is_on_the_processor():
    batch = Batch(torch.zeros(1, 2, 3, 4, 4), torch.tensor([1, 0]), torch.tensor([5, 6]))
    moved = Transfer(torch.device("cpu"))(batch)
    assert all(a is b for a, b in zip(moved, batch, strict=True))


class Acted:
    """A tensor or a stream that writes down what happens to it, on which stream."""

    def __init__(self, name, story, current):
        self.name, self.story, self.current = name, story, current

    def to(self, device, *, non_blocking):
        assert (device.type, non_blocking) == ("cuda", True)
        self.story.append(f"{self.name} copied on {self.current[-1].name}")
        return self

    def record_stream(self, stream):
        self.story.append(f"{self.name} kept for {stream.name}")

    def wait_stream(self, stream):
        self.story.append(f"{self.name} waits for {stream.name}")


@pytest.fixture
def stage(monkeypatch):
    story, current = [], []
    compute, own = (Acted(name, story, current) for name in ("compute", "own"))
    current.append(compute)

    @contextmanager
    def using(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    return story, Batch(*(Acted(name, story, current) for name in Batch._fields))


def test_on_a_gpu_copies_travel_beside_the_step_before(stage):
    story, batch = stage
    Transfer(torch.device("cuda"))(batch)
    assert story == [
        *(f"{name} copied on own" for name in Batch._fields),
        "compute waits for own",
        *(f"{name} kept for compute" for name in Batch._fields),
    ]
