"""DATA as it is written: names, folders, tables, and what is none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from image_files import encoded, folder, noise, write

from nearkin.data.dataset import load_dataset
from nearkin.data.images import open_images
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError
from nearkin.files import cache_folder


def test_digits_are_the_published_ones_split_once_and_for_all():
    from sklearn.datasets import load_digits

    listing = resolve("digits")
    whole = load_digits()
    seen = []
    for part, count in (("train", 1437), ("test", 360)):
        listed, labels, classes = listing.parts[part]
        images = open_images(listed, "auto")
        assert len(images) == len(labels) == count
        assert classes == tuple("0123456789")
        for row in range(count):
            number = int(images.name(row).removeprefix("digits/"))
            seen.append(number)
            assert labels[row] == whole.target[number]
            expected = torch.tensor(
                [[round(v * 255 / 16) for v in line] for line in whole.images[number]]
            )
            assert torch.equal(images.read(row), expected.to(torch.uint8)[None])
    assert sorted(seen) == list(range(1797))
    counts = np.bincount(listing.parts["test"].labels)
    assert np.abs(counts - np.bincount(whole.target) * 0.2).max() < 1


def test_digits_are_grey_and_their_test_split_does_not_depend_on_the_seed():
    first, second = (load_dataset("digits", seed=seed) for seed in (0, 1))
    assert first.channels == 1
    assert {name: len(split.labels) for name, split in first.splits.items()} == {
        "train": 1294,
        "val": 143,
        "test": 360,
    }
    names = [
        [s.images.name(row) for row in range(360)]
        for s in (first.splits["test"], second.splits["test"])
    ]
    assert names[0] == names[1]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_download_is_told(monkeypatch, tmp_path, size):
    """FashionMNIST that was killed while it unpacked; nothing is downloaded here."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (raw / f"{part}-{kind}").write_bytes(b"\0" * size)
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match="delete what a stopped download left there"):
        resolve("fashion-mnist")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("no/such/folder", ["missing"]),
        ("", ["missing"]),
        ("a\0b", ["missing"]),
        ("cifr10", ["missing", "Did you mean cifar10?"]),
        ("hf://someone/images", ["not a folder or table on this machine"]),
        ("wds://shards-{000..099}.tar", ["not a folder or table on this machine"]),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(data, words):
    with pytest.raises(DataError) as caught:
        resolve(data)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_files_that_are_no_tables(tmp_path):
    write(tmp_path / "images.zip", b"PK")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("images.zip", "pipe.csv"):
        with pytest.raises(DataError, match="neither a folder of class folders nor a table"):
            resolve(str(tmp_path / name))


def test_a_built_in_name_wins_unless_written_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "digits", a=1, b=1)
    listing = resolve("digits")
    assert len(listing.parts["train"].labels) == 1437
    assert any("./digits" in note for note in listing.notes)
    assert resolve("./digits").parts["train"].classes == ("a", "b")


def known(asked: list[dict], **attributes):
    """Stands for a torchvision data set: notes its arguments, prints as they do, has the attributes."""

    class Known:
        def __init__(self, root, **arguments):
            print("Files already downloaded and verified")
            asked.append({"root": os.fspath(root), **arguments})
            for name, value in attributes.items():
                setattr(self, name, value(arguments) if callable(value) else value)

    return Known


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_arrays_of_torchvision(cache, monkeypatch, capsys):
    grid = np.arange(4 * 3 * 5 * 6, dtype=np.uint8)
    asked: list[dict] = []
    kinds = {
        "CIFAR10": known(
            asked, data=grid.reshape(4, 5, 6, 3), targets=[1, 0, 1, 0], classes=["x", "y"]
        ),
        "SVHN": known([], data=grid.reshape(4, 3, 5, 6), labels=np.array([0, 1, 2, 2])),
        "MNIST": known(
            [],
            data=torch.from_numpy(grid).reshape(4, 15, 6),
            targets=torch.tensor([0, 1, 0, 1]),
            classes=["0 - zero", "1 - one"],
        ),
    }
    for name, kind in kinds.items():
        monkeypatch.setattr(f"torchvision.datasets.{name}", kind)
    cifar, svhn, mnist = (resolve(name) for name in ("cifar10", "svhn", "mnist"))
    assert [a["train"] for a in asked] == [True, False]
    assert all(a["root"] == str(cache) and a["download"] is False for a in asked)
    part = cifar.parts["train"]
    assert part.labels.tolist() == [1, 0, 1, 0]
    assert part.classes == ("x", "y")
    expected = torch.from_numpy(grid.reshape(4, 5, 6, 3)[2]).permute(2, 0, 1)
    assert torch.equal(open_images(part.images, 3).read(2), expected)
    part = svhn.parts["test"]
    assert torch.equal(
        open_images(part.images, 3).read(1), torch.from_numpy(grid.reshape(4, 3, 5, 6)[1])
    )
    assert part.classes == ("0", "1", "2")
    digits = open_images(mnist.parts["train"].images, "auto")
    assert digits.channels == 1
    assert digits.read(0).shape == (1, 15, 6)
    assert capsys.readouterr().out == ""  # stdout is for results


def test_files_of_torchvision(cache, tmp_path, monkeypatch):
    def files(arguments):
        paths = [tmp_path / "f" / arguments["split"] / f"{n}.png" for n in range(3)]
        for number, path in enumerate(paths):
            write(path, encoded(noise(number), "PNG"))
        return paths

    kind = known([], _image_files=files, _labels=[0, 1, 1], classes=["rose", "tulip"])
    monkeypatch.setattr("torchvision.datasets.Flowers102", kind)
    dataset = load_dataset("flowers102", seed=0)
    assert set(dataset.splits) == {"train", "val", "test"}
    assert dataset.splits["val"].labels.tolist() == [0, 1, 1]
    assert dataset.splits["val"].images.read(2).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "name", ["cifar10", "stl10", "oxford-iiit-pet", "food101", "flowers102", "svhn", "mnist"]
)
def test_the_real_classes_take_the_arguments_and_say_when_nothing_is_there(
    cache, monkeypatch, name
):
    """Not downloaded here: the first attempt must fail the way that starts a download, and that is stopped."""
    import torchvision.datasets.utils as utils

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(utils, "_urlretrieve", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(
        DataError, match=f"{name} could not be downloaded to .*NEARKIN_CACHE_DIR"
    ) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("NEARKIN_CACHE_DIR")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 5)
    with pytest.raises(DataError, match="no home folder.*set NEARKIN_CACHE_DIR"):
        cache_folder()


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    write(tmp_path / "file", b"")
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"cannot be made.*NEARKIN_CACHE_DIR"):
        resolve("cifar10")


def test_what_torchvision_must_have_is_there():
    """The names that are read from torchvision's objects, looked up in its source: a new version may drop them."""
    import inspect

    from torchvision import datasets

    wanted = {
        "CIFAR10": ["self.data", "self.targets", "self.classes"],
        "MNIST": ["self.data", "self.targets", "classes ="],
        "SVHN": ["self.data", "self.labels"],
        "STL10": ["self.data", "self.labels", "self.classes"],
        "Flowers102": ["self._image_files", "self._labels", "classes ="],
        "OxfordIIITPet": ["self._images", "self._labels", "self.classes"],
        "Food101": ["self._image_files", "self._labels", "self.classes"],
    }
    for name, attributes in wanted.items():
        source = inspect.getsource(getattr(datasets, name))
        assert not [a for a in attributes if a not in source], name


SOURCES = ("builtin", "folders", "listing", "resolve", "tables")


@pytest.mark.parametrize("words", [[], ["/no/such/folder"], ["EMPTY"], ["TABLE"], ["IMAGES"]])
def test_data_are_listed_without_torch_and_without_pillow(tmp_path, words):
    (tmp_path / "EMPTY").mkdir()
    write(tmp_path / "TABLE" / "x.csv", b"path,label\n")
    folder(tmp_path / "IMAGES", a=2, b=2)
    paths = [word.replace("TABLE", "TABLE/x.csv") for word in words]
    program = f"""
import sys
{"; ".join(f"import nearkin.data.sources.{name}" for name in SOURCES)}
from nearkin.errors import DataError
from nearkin.files import cache_folder
for path in {paths!r}:
    try:
        nearkin.data.sources.resolve.resolve(path)
    except DataError as error:
        print(error)
print([name for name in ("torch", "PIL", "sklearn", "pydantic") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) == 1 + (words not in ([], ["IMAGES"]))


def test_digits_are_those_of_scikit_learn_and_its_split():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    parts = resolve("digits").parts
    for split, chosen in (("train", np.sort(train)), ("test", np.sort(test))):
        assert (parts[split].labels == digits.target[chosen]).all()
        expected = np.rint(digits.images[chosen] * (255 / 16))
        assert (parts[split].images.array[..., 0] == expected).all()
