"""Files and arrays behind one interface."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write
from PIL import Image

from nearkin.data.decode import BadImage
from nearkin.data.images import Arrays, Files
from nearkin.data.sources.listing import FileList


def listed(root, names) -> Files:
    return Files(FileList.pack(str(root), map(os.fsencode, names)))


@pytest.fixture
def files(tmp_path):
    names = ["b.png", "a/é.png", os.fsdecode(b"a/\xff.png")]
    for number, name in enumerate(names):
        write(tmp_path / name, encoded(noise(number), "PNG"))
    return listed(tmp_path, names)


def pixels(number: int) -> torch.Tensor:
    return torch.from_numpy(np.array(noise(number))).permute(2, 0, 1)


def test_files_in_any_order(files):
    assert (len(files), files.channels, files.from_files) == (3, 3, True)
    picked = files.take([2, 0, 2])
    assert [picked.name(row) for row in range(3)] == [
        os.fsdecode(b"a/\xff.png"),
        "b.png",
        os.fsdecode(b"a/\xff.png"),
    ]
    for row, number in enumerate([2, 0, 2]):
        assert torch.equal(picked.read(row), pixels(number))
    assert len(files.take([])) == 0
    assert len(set(files.identities())) == 3


def test_files_travel_to_workers(files):
    copy = pickle.loads(pickle.dumps(Files(files.files, 1)))
    assert copy.channels == 1
    assert torch.equal(copy.read(1)[0], torch.from_numpy(np.array(noise(1).convert("L"))))


def test_scaled_files_stay_so(tmp_path):
    large = Image.fromarray(np.full((240, 320, 3), 90, dtype=np.uint8))
    large.save(tmp_path / "x.jpg")
    files = listed(tmp_path, ["x.jpg"])
    scaled = files.scaled(50)
    same = [scaled, scaled.take([0]), pickle.loads(pickle.dumps(scaled))]
    assert [each.read(0).shape for each in same] == 3 * [(3, 60, 80)]
    assert files.read(0).shape == (3, 240, 320)
    assert list(scaled.identities()) == list(files.identities())


def test_names_are_kept_packed(tmp_path):
    names = [f"some_class/{number:07}.jpg" for number in range(50_000)]
    packed = listed("root", names)
    assert len(pickle.dumps(packed)) < 50_000 * (len(names[0]) + 9) + 1000
    assert [packed.name(row) for row in (0, 12_345, 49_999)] == [names[0], names[12_345], names[-1]]


def test_a_missing_file_is_a_bad_image(tmp_path):
    source = listed(tmp_path, ["gone.png"])
    with pytest.raises(BadImage, match=r"gone\.png cannot be used: no such file"):
        source.read(0)
    assert list(source.identities()) == [b"gone.png\0-1"]


def test_arrays_keep_their_names_when_picked():
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    source = Arrays(array, "set")
    picked = source.take(np.array([4, 1])).take([1])
    assert (len(source), source.channels, source.from_files) == (6, 3, False)
    assert picked.name(0) == "set/1"
    assert torch.equal(picked.read(0), torch.from_numpy(array[1]).permute(2, 0, 1))
    assert list(picked.identities()) == [array[1].tobytes()]
    assert torch.equal(pickle.loads(pickle.dumps(picked)).read(0), picked.read(0))


def test_grey_arrays_become_colour_and_back():
    grey = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    colour = Arrays(grey, "g", 3)
    assert colour.channels == 3
    assert torch.equal(colour.read(1), torch.from_numpy(grey[1, ..., 0]).expand(3, 4, 4))
    assert torch.equal(Arrays(grey, "g", 1).read(1), torch.from_numpy(grey[1]).permute(2, 0, 1))


def test_colour_arrays_become_grey_as_files_do():
    array = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    expected = np.array(Image.fromarray(array[0]).convert("L"))
    assert np.array_equal(Arrays(array, "c", 1).read(0)[0].numpy(), expected)
