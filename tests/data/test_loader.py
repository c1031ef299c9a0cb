"""Batches are the same for any number of workers and ranks, and errors in workers stay readable."""

# ruff: noqa: NPY002 - NumPy's global state is what is tested

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, folder, noise

from nearkin.data import loader
from nearkin.data.dataset import Split, load_dataset
from nearkin.data.images import Arrays
from nearkin.data.loader import WorkersDied, eval_loader, train_loader
from nearkin.data.sampling import TrainOrder, sample_seed
from nearkin.data.transforms import (
    EvalSpec,
    Pipeline,
    TrainSpec,
    eval_transform,
    train_transform,
)
from nearkin.errors import DataError

pytestmark = pytest.mark.timeout(120)
N, B = 37, 8


@pytest.fixture
def split():
    array = np.random.default_rng(0).integers(0, 256, (N, 9, 9, 3), dtype=np.uint8)
    return Split("train", Arrays(array, "x"), np.arange(N) % 5)


def loaded(
    split, *, workers=0, views=2, rank=0, world_size=1, first=0, last=9, seed=4, transform=None
):
    spec = TrainSpec.of("light", image_size=9, channels=3, flip=True)
    transform = transform or train_transform(spec)
    order = TrainOrder(
        len(split.labels),
        seed=seed,
        batch_size=B,
        first=first,
        last=last,
        rank=rank,
        world_size=world_size,
    )
    return list(train_loader(split, transform, order, views=views, seed=seed, workers=workers))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_shape_of_a_batch(split):
    batch = loaded(split)[0]
    assert batch.images.shape == (2, B, 3, 9, 9)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.index.dtype == torch.int64
    assert torch.equal(batch.labels, batch.index % 5)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_makes_the_same_batches(split, workers):
    assert_same(loaded(split, workers=workers), loaded(split))


def test_two_ranks_make_the_batches_of_one(split):
    ranks = [loaded(split, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(loaded(split), *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts], 1))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))


def test_a_later_start_makes_the_rest(split):
    assert_same(loaded(split, first=5), loaded(split)[5:])


@pytest.mark.parametrize("crop", ["padded", "centre", 0.35])
def test_each_view_is_made_under_its_own_seed(split, crop, monkeypatch):
    monkeypatch.setattr(loader, "TOGETHER", 3 * 9 * 9 * 3)  # bytes of three images; a batch has 8
    spec = TrainSpec.of("light", image_size=9, channels=3, flip=True)
    transform = train_transform(spec.model_copy(update={"crop_scale": crop}))
    for step, batch in enumerate(loaded(split, views=3, transform=transform)):
        for place, row in enumerate(batch.index.tolist()):
            for view in range(3):
                torch.manual_seed(sample_seed(4, step // (N // B), row, 0, view))
                assert torch.equal(batch.images[view, place], transform(split.images.read(row)))


@pytest.mark.parametrize("other", [(3, 8, 9), (1, 9, 9)])
def test_images_of_several_sizes_are_refused(split, other):
    made = iter([torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(other, dtype=torch.uint8)])
    with pytest.raises(RuntimeError, match="equal size"):
        loaded(split, transform=Pipeline((lambda _: next(made),)))


def test_views_epochs_and_seeds_differ(split):
    first, second = loaded(split), loaded(split, seed=5)
    assert not torch.equal(first[0].images[0], first[0].images[1])
    assert not torch.equal(first[0].index, second[0].index)
    rows = {}
    for batch in first:
        for place, row in enumerate(batch.index.tolist()):
            rows.setdefault(row, []).append(batch.images[0, place])
    again = [images for images in rows.values() if len(images) > 1]
    assert sum(not torch.equal(images[0], images[1]) for images in again) > len(again) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_as_they_were(split, workers):
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    loaded(split, workers=workers)
    list(eval_loader(split, alone(unchanged), range(5), batch_size=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


class alone:
    """One view of each image."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return (self.transform(image),)


def unchanged(image):
    return image


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rows", [range(N), range(1, N, 3), [5, 2, 2], range(0)])
def test_evaluation_neither_pads_nor_drops(split, workers, rows):
    transform = eval_transform(EvalSpec.for_size(9, 3))
    batches = list(eval_loader(split, alone(transform), rows, batch_size=B, workers=workers))
    assert [row for batch in batches for row in batch.index.tolist()] == list(rows)
    assert all(len(batch.index) == B for batch in batches[:-1])
    for batch in batches:
        assert batch.images.shape[:2] == (1, len(batch.index))
        for place, row in enumerate(batch.index.tolist()):
            assert torch.equal(batch.images[0, place], split.images.read(row))
            assert batch.labels[place] == split.labels[row]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_went_bad_is_one_sentence(tmp_path, workers):
    folder(tmp_path, a=4, b=4)
    dataset = load_dataset(str(tmp_path), val_split=0, seed=0)
    (tmp_path / "b" / "002.png").write_bytes(encoded(noise(0), "PNG")[:40])
    transform = eval_transform(EvalSpec.for_size(8, 3))
    with pytest.raises(DataError) as caught:
        list(
            eval_loader(
                dataset.splits["train"], alone(transform), range(8), batch_size=2, workers=workers
            )
        )
    message = str(caught.value)
    assert "b/002.png cannot be used: it is" in message
    assert "could be read at the start" in message
    assert "\n" not in message
    assert "Traceback" not in message


def die(image):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return image


def test_a_worker_that_dies_is_named(split):
    with pytest.raises(WorkersDied, match="lower --workers") as caught:
        loaded(split, transform=Pipeline((die,)), workers=1)
    assert caught.value.code == 75


def cannot_be_sent(image):
    def refuse(_):
        raise OSError(24, "Too many open files")

    ForkingPickler.register(torch.Tensor, refuse)
    return image


def test_a_batch_that_cannot_be_sent_ends_the_run(split, capfd):
    with pytest.raises(WorkersDied, match="process that loads images died"):
        loaded(split, transform=Pipeline((cannot_be_sent,)), workers=1)
    assert "cannot send a batch: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


def whether_signals_are_ignored(image):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    threads = torch.get_num_threads()
    return torch.full((1, 1, 1), threads, dtype=torch.uint8)


def test_workers_outlive_signals_and_take_one_thread(split):
    batches = loaded(split, transform=Pipeline((whether_signals_are_ignored,)), workers=2)
    assert all((batch.images == 1).all() for batch in batches)


HOLDS_AN_UNFINISHED_LOADER = """
import numpy as np, sys
from nearkin.data.dataset import Split
from nearkin.data.sampling import TrainOrder
from nearkin.data.loader import train_loader
from nearkin.data.images import Arrays
from nearkin.data.transforms import Pipeline
sys.path.insert(0, {tests!r})
import test_loader
split = Split("train", Arrays(np.zeros((64, 8, 8, 1), dtype=np.uint8), "x"), np.zeros(64, dtype=np.int64))
order = TrainOrder(64, seed=0, batch_size=8, first=0, last=1000)
batches = train_loader(split, Pipeline((test_loader.unchanged,)), order, views=1, seed=0, workers=2)
next(batches)
held = iter(batches)
try:
    for batch in train_loader(split, Pipeline((test_loader.fail,)), order, views=1, seed=0, workers=2): pass
except ZeroDivisionError as error:
    kept = error  # its traceback holds the second loader
print("ended", flush=True)
"""


def test_workers_do_not_keep_a_program_from_ending(tmp_path):
    """They ignore SIGTERM from others, but must obey the process that made them. Nothing of theirs is left."""
    script = HOLDS_AN_UNFINISHED_LOADER.format(tests=os.fspath(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script],
        timeout=60,
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.stdout == "ended\n"
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def fail(image):
    raise ZeroDivisionError("a mistake in a transform")


def test_a_mistake_in_a_transform_is_no_data_error(split):
    with pytest.raises(ZeroDivisionError, match="a mistake in a transform"):
        loaded(split, transform=Pipeline((fail,)), workers=1)


def test_the_overhead_per_image_is_small():
    """12 epochs of digits must load in seconds; generous, since the machine may be busy."""
    array = np.zeros((1024, 8, 8, 1), dtype=np.uint8)
    small = Split("train", Arrays(array, "x"), np.zeros(1024, dtype=np.int64))
    transform = train_transform(TrainSpec.of("light", image_size=8, channels=1))
    started = time.process_time()
    assert len(loaded(small, views=1, last=128, transform=transform)) == 128
    assert (time.process_time() - started) / 1024 < 500e-6


def test_only_waiting_makes_a_batch_overdue(split, monkeypatch):
    """A validation between two batches may take as long as it likes."""
    monkeypatch.setattr(loader, "POLL", 0.05)
    monkeypatch.setattr(loader, "OVERDUE", 1.0)
    batches = eval_loader(split, alone(unchanged), range(5), batch_size=1, workers=1)
    assert next(batches).index.tolist() == [0]
    time.sleep(2)
    assert [int(batch.index) for batch in batches] == [1, 2, 3, 4]


def test_the_end_of_the_thread_that_pins_memory_is_noticed():
    """torch looks at that thread only where batches are awaited without a limit."""
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()

    class Awaited:
        _pin_memory_thread = ended

        def __next__(self):
            raise RuntimeError("DataLoader timed out after 1.0 seconds")

    with pytest.raises(WorkersDied, match="thread that takes images for the GPU"):
        loader._next(Awaited(), loader._Watch([], 0.0))
