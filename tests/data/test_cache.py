"""A cache changes where pixels come from, and only those pixels that it says it changes."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write

from nearkin.data import cache as cache_room
from nearkin.data import decode
from nearkin.data.cache import Contents, Made, home, make_pack, packed
from nearkin.data.dataset import choose, leave_out, load_dataset, numbered
from nearkin.data.loader import eval_loader, train_loader
from nearkin.data.look import BadImages
from nearkin.data.sampling import TrainOrder
from nearkin.data.sources.resolve import resolve
from nearkin.data.transforms import (
    EvalSpec,
    ResizeShortSide,
    TrainSpec,
    eval_transform,
    train_transform,
)
from nearkin.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_homes(tmp_path, monkeypatch):
    """Neither this person's caches nor the machine's shared memory are touched."""
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "kept"))
    memory = tmp_path / "memory"
    memory.mkdir()
    real = cache_room.home
    monkeypatch.setattr(cache_room, "home", lambda w: memory if w == "ram" else real(w))


def pictures(root: Path, sizes=((30, 40), (50, 31), (8, 8), (60, 25))) -> Path:
    for name in ("a", "b"):
        for number, (height, width) in enumerate(sizes):
            image = noise(number + len(name), height, width)
            write(root / name / f"{number}.png", encoded(image, "PNG"))
    return root


def choose_all(root):
    listing = resolve(str(root))
    return choose(listing, channels=3, val_split=0, seed=0, images_per_class=None)


def made(dataset, side=20, where="ram"):
    contents = Contents(dataset.files, side)
    result = make_pack(contents, where, 2)
    return packed(dataset, contents, result.pack), result


@pytest.fixture
def dataset(tmp_path):
    return load_dataset(str(pictures(tmp_path / "data")), val_split=0.25, seed=0)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_every_image_is_the_shrunken_one_under_its_own_name(dataset, where):
    cached, result = made(dataset, 20, where)
    assert set(cached.splits) == {"train", "val"}
    for name, split in cached.splits.items():
        plain = dataset.splits[name]
        assert np.array_equal(split.labels, plain.labels)
        assert list(split.images.identities()) == list(plain.images.identities())
        for row in range(len(plain.labels)):
            image = plain.images.read(row)
            small = min(image.shape[-2:]) <= 20
            expected = image if small else ResizeShortSide(20)(image)
            assert torch.equal(split.images.read(row), expected)
            assert split.images.name(row) == plain.images.name(row)
    assert "8 images" in str(result)
    assert "built in" in str(result)


def test_evaluation_sees_the_same_pixels(dataset):
    transform = eval_transform(EvalSpec.for_size(16, 3, 0.8))
    cached, _ = made(dataset, 20)
    rows = range(len(dataset.splits["train"].labels))
    for row in rows:
        plain, kept = (d.splits["train"].images.read(row) for d in (dataset, cached))
        assert torch.equal(transform(plain), transform(kept))


def trained(split, side, workers=0):
    transform = train_transform(TrainSpec.of("light", image_size=side, channels=3, flip=True))
    order = TrainOrder(len(split.labels), seed=3, batch_size=4, first=0, last=6)
    return list(train_loader(split, transform, order, views=2, seed=3, workers=workers))


@pytest.mark.parametrize("sizes", [((24, 24),) * 4, ((30, 40), (50, 31), (24, 60), (60, 25))])
@pytest.mark.parametrize("workers", [0, 2])
def test_small_training_images_are_the_same_bits(tmp_path, sizes, workers):
    plain = load_dataset(str(pictures(tmp_path / "data", sizes)), val_split=0)
    cached, _ = made(plain, 24)
    for one, other in zip(
        trained(plain.splits["train"], 24),
        trained(cached.splits["train"], 24, workers),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_does_not_change_the_cache(tmp_path):
    plain = load_dataset(str(pictures(tmp_path / "data", ((24, 24),) * 4)), val_split=0)
    cached, result = made(plain, 24)
    before = (result.pack.folder / "pixels.bin").read_bytes()
    for batch in trained(cached.splits["train"], 24):
        batch.images.fill_(0)
    kept = [cached.splits["train"].images.read(row).clone() for row in range(8)]
    assert (result.pack.folder / "pixels.bin").read_bytes() == before
    assert all(torch.equal(kept[r], plain.splits["train"].images.read(r)) for r in range(8))


def test_taken_rows(dataset):
    cached, _ = made(dataset)
    images = cached.splits["train"].images
    taken = images.take([2, 0])
    assert torch.equal(taken.read(0), images.read(2))
    assert taken.name(1) == images.name(0)
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read(1), images.read(1))


def test_a_cache_on_the_disk_is_found_again_until_a_file_changes(dataset, tmp_path):
    first, second = (made(dataset, 20, "disk")[1] for _ in range(2))
    assert first.seconds > 0
    assert second.seconds == 0
    assert "found there" in str(second)
    assert first.pack.folder == second.pack.folder
    assert made(dataset, 21, "disk")[1].seconds > 0, "another side is another cache"
    path = tmp_path / "data" / "a" / "0.png"
    write(path, encoded(noise(99, 30, 40), "PNG"))
    os.utime(path, ns=(1, 1))
    changed, third = made(dataset, 20, "disk")
    assert third.seconds > 0
    for name, split in dataset.splits.items():
        for row in range(len(split.labels)):
            image = split.images.read(row)
            if split.images.name(row).endswith("a/0.png"):
                kept = changed.splits[name].images.read(row)
                assert torch.equal(kept, ResizeShortSide(20)(image))
                return
    raise AssertionError("the changed image is in no split")


@pytest.mark.parametrize("damage", ["short", "no manifest", "other key", "no JSON"])
def test_a_damaged_cache_is_built_again(dataset, damage):
    where = made(dataset, 20, "disk")[1].pack.folder
    if damage == "short":
        (where / "pixels.bin").write_bytes(b"x")
    elif damage == "no manifest":
        (where / "cache.json").unlink()
    else:
        (where / "cache.json").write_text("[1" if damage == "no JSON" else '{"key": "x"}')
    cached, again = made(dataset, 20, "disk")
    assert again.seconds > 0
    plain = dataset.splits["val"].images.read(0)
    assert cached.splits["val"].images.read(0).shape[0] == plain.shape[0]


def test_memory_is_given_back_with_the_last_reference(dataset):
    cached, result = made(dataset)
    where = result.pack.folder
    assert where.is_dir()
    assert not where.stat().st_mode & 0o077, "nobody else may look"
    del cached, result
    assert not where.exists()


HOLDS_A_CACHE = """
import sys, time
from pathlib import Path
from nearkin.data import cache
from nearkin.data.dataset import load_dataset
cache.home = lambda where: Path({memory!r})
contents = cache.Contents(load_dataset({data!r}, val_split=0).files, 20)
held = cache.make_pack(contents, "ram", 1)
print(held.pack.folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(
    dataset, tmp_path, end
):
    program = HOLDS_A_CACHE.format(memory=str(tmp_path / "memory"), data=str(tmp_path / "data"))
    if end == "exit":
        program = program.replace("time.sleep(60)", "")
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        where = Path(child.stdout.readline().strip())
        if end == "exit":
            child.wait(30)
            assert not where.exists(), "it cleans up behind itself"
            return
        age(where)
        made(dataset)
        assert where.is_dir(), "it is in use"
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        assert where.is_dir()
        made(dataset)
        assert not where.exists()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def age(folder):
    """As if it were made two minutes ago."""
    os.utime(folder, (time.time() - 120,) * 2)


def test_a_folder_whose_owner_is_about_to_lock_it_is_not_swept(dataset, tmp_path):
    fresh = tmp_path / "memory" / f"{cache_room.DRAFT}x"
    fresh.mkdir()
    (fresh / cache_room.OWNER).touch()
    made(dataset)
    assert fresh.is_dir()
    age(fresh)
    made(dataset)
    assert not fresh.exists()


def test_no_room_is_said_before_anything_is_written(dataset, monkeypatch, tmp_path):
    usage = cache_room.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="needs about .* GiB .* are free; make room, or use"):
        made(dataset)
    assert not list((tmp_path / "memory").iterdir())


def test_a_disk_that_fills_up_leaves_nothing(dataset, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_room.np, "save", full)
    with pytest.raises(ConfigError, match="No space left on device; make room, or use --cache ram"):
        made(dataset, 20, "disk")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["look.sqlite"]


def test_a_place_that_is_no_folder_is_one_sentence(dataset, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(DataError, match="cache folder .* cannot be made"):
        made(dataset, 20, "disk")


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_bad_images_are_found_while_the_cache_is_built_and_when_it_is_found_again(tmp_path, where):
    root = pictures(tmp_path / "data", ((24, 24),) * 4)
    chosen = choose_all(root)
    write(root / "b" / "1.png", b"no image")
    for _ in range(2):
        contents = Contents(chosen.files, 20)
        result = make_pack(contents, where, 2)
        bad = result.bad
        assert list(bad) == [bytes(root / "b" / "1.png")]
        with pytest.raises(BadImages, match=r"1 of 8 images cannot be read: .*b/1.png \(it is no"):
            leave_out(chosen, bad, "error")
        plain = numbered(leave_out(chosen, bad, "skip"), None)
        cached = packed(plain, contents, result.pack).splits["train"].images
        assert len(cached) == 7
        for row in range(7):
            expected = ResizeShortSide(20)(plain.splits["train"].images.read(row))
            assert torch.equal(cached.read(row), expected)


def test_a_cache_without_an_image_that_can_be_read_by_now_is_built_again(tmp_path, monkeypatch):
    """Such as after the memory ran out, of which a decoder tells as of damage."""
    contents = Contents(choose_all(pictures(tmp_path / "data")).files, 20)
    real = Contents.image

    def starved(self, path):
        found = real(self, path)
        if path != self.paths[1]:
            return found
        return found._replace(image=None, fact=None, reason="it is damaged (broken data stream)")

    monkeypatch.setattr(Contents, "image", starved)
    assert list(make_pack(contents, "disk", 1).bad) == [contents.paths[1]]
    monkeypatch.setattr(Contents, "image", real)
    result = make_pack(contents, "disk", 1)
    assert result.bad == {}
    assert (result.pack.sizes > 0).all()


def test_no_file_is_decoded_twice_for_a_cache_nor_looked_at_afterwards(tmp_path, monkeypatch):
    root = pictures(tmp_path / "data")
    decoded: list[str] = []
    real = decode._decode

    def counting(path, *rest, **named):
        decoded.append(path)
        return real(path, *rest, **named)

    monkeypatch.setattr(decode, "_decode", counting)
    chosen = choose_all(root)
    make_pack(Contents(chosen.files, 20), "ram", 2)
    assert sorted(decoded) == sorted(chosen.files["train"].files)
    load_dataset(str(root), check="full")
    assert len(decoded) == 8


def test_two_that_build_the_same_cache_both_have_it(dataset, monkeypatch):
    """The other one finishes while we are building."""
    real = cache_room._publish
    contents = Contents(dataset.files, 20)

    def late(*given):
        monkeypatch.setattr(cache_room, "_publish", real)
        made(dataset, 20, "disk")
        real(*given)

    monkeypatch.setattr(cache_room, "_publish", late)
    result = make_pack(contents, "disk", 1)
    assert result.pack.complete(contents.key())
    assert {p.name for p in home("disk").iterdir()} == {result.pack.folder.name, "look.sqlite"}


def test_the_time_and_the_size_are_told():
    class Full:
        folder, starts, sizes = Path("/somewhere"), np.array([0, 2**30]), np.zeros((7, 2))

    assert str(Made(Full(), 1.26, {})) == "cache: 7 images, 1.00 GiB in /somewhere, built in 1.3 s"


def test_evaluation_loads_from_the_cache_in_workers(dataset):
    cached, _ = made(dataset)
    rows = range(len(cached.splits["train"].labels))

    def look(images):
        return (eval_transform(EvalSpec.for_size(16, 3, 0.8))(images),)

    for workers in (0, 2):
        batches = list(
            eval_loader(cached.splits["train"], look, rows, batch_size=3, workers=workers)
        )
        assert sum(len(batch.labels) for batch in batches) == len(rows)
