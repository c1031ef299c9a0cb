"""Folders of class folders: what is a class, what is a split, what is left out and said so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_files import encoded, folder, noise, write

from nearkin.data.dataset import load_dataset
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError

PNG = encoded(noise(0), "PNG")
STRANGE = [
    "space in it",
    "emoji 😀",
    "e\u0301",
    "\u00e9",
    "right \u202e to left",
    "new\nline",
    "tab\there",
    "quote\"'",
    "comma,",
    "'; DROP TABLE x",
    "-dash",
    "--help",
    "%00",
    "a" * 200,
    os.fsdecode(b"\xff\xfe"),
    "no",
    "null",
    "~",
    "1e5",
    "007",
    "=SUM(1)",
    "CON",
]


def contents(root) -> dict[str, dict[str, list[str]]]:
    """split -> class -> names, as the listing tells them."""
    listing = resolve(os.fspath(root))
    found: dict[str, dict[str, list[str]]] = {}
    for split, part in listing.parts.items():
        for row, place in enumerate(part.labels):
            found.setdefault(split, {}).setdefault(part.classes[place], []).append(
                part.images.name(row)
            )
    return found


def notes(root) -> str:
    return "\n".join(resolve(os.fspath(root)).notes)


def test_a_flat_folder_is_train_in_sorted_order(tmp_path):
    folder(tmp_path, b=2, a=1)
    assert contents(tmp_path) == {"train": {"a": ["a/000.png"], "b": ["b/000.png", "b/001.png"]}}
    assert notes(tmp_path) == ""


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL"])
def test_split_folders(tmp_path, val):
    folder(tmp_path, **{"train/a": 1, "train/b": 1, f"{val}/a": 1, "test/b": 1})
    assert contents(tmp_path) == {
        "train": {"a": ["train/a/000.png"], "b": ["train/b/000.png"]},
        "val": {"a": [f"{val}/a/000.png"]},
        "test": {"b": ["test/b/000.png"]},
    }


def test_two_folders_for_one_split_are_refused(tmp_path):
    folder(tmp_path, **{"train/a": 1, "val/a": 1, "valid/a": 1})
    with pytest.raises(DataError, match=r"two folders for the split val, val and valid"):
        resolve(str(tmp_path))


def test_other_folders_beside_the_splits_are_said_to_be_ignored(tmp_path):
    folder(tmp_path, **{"train/a": 1, "test/a": 1, "extra/a": 1})
    assert set(contents(tmp_path)) == {"train", "test"}
    assert "1 folder beside the splits is ignored: extra" in notes(tmp_path)


def test_a_split_without_images_is_said_to_be_ignored(tmp_path):
    folder(tmp_path, **{"train/a": 1, "train/b": 1})
    (tmp_path / "val" / "a").mkdir(parents=True)
    assert set(contents(tmp_path)) == {"train"}
    assert "1 split without images is ignored: val" in notes(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    folder(tmp_path, bus=1, train=2, car=1)
    assert sorted(contents(tmp_path)["train"]) == ["bus", "car", "train"]


def test_a_class_may_be_called_test(tmp_path):
    folder(tmp_path, rest=1, test=1)
    assert sorted(contents(tmp_path)["train"]) == ["rest", "test"]


def test_hidden_and_empty_folders_are_no_classes(tmp_path):
    folder(tmp_path, a=1, b=1)
    for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found"):
        write(tmp_path / name / "x.png", PNG)
        write(tmp_path / "a" / name / "x.png", PNG)
    write(tmp_path / "a" / "._0.png", PNG)
    write(tmp_path / "text only" / "x.txt", b"text")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert sorted(contents(tmp_path)["train"]) == ["a", "b"]
    assert "2 folders without images are no classes: empty, text only" in notes(tmp_path)
    assert "11 hidden files or folders are ignored" in notes(tmp_path)
    assert "1 file that is no image is ignored" in notes(tmp_path)


def test_nested_folders_belong_to_the_class_above(tmp_path):
    write(tmp_path / "a" / "deep" / "er" / "x.png", PNG)
    write(tmp_path / "a.b" / "x.png", PNG)
    assert contents(tmp_path) == {"train": {"a": ["a/deep/er/x.png"], "a.b": ["a.b/x.png"]}}


def test_files_at_the_top_are_ignored_and_noted(tmp_path):
    folder(tmp_path, a=1, b=1)
    write(tmp_path / "top.png", PNG)
    write(tmp_path / "README.md", b"text")
    assert sorted(contents(tmp_path)["train"]) == ["a", "b"]
    assert "2 files beside the class folders are ignored" in notes(tmp_path)


def test_suffixes_in_any_case(tmp_path):
    good = ["a.JPG", "b.Jpeg", "c.png", "d.WEBP", "e.bmp", "f.tif", "g.TIFF", "h.gif"]
    for name in [*good, "i.txt", "j.svg", "k", "l.png.bak"]:
        write(tmp_path / "a" / name, PNG)
    assert contents(tmp_path)["train"]["a"] == [f"a/{name}" for name in good]
    assert "4 files that are no images are ignored" in notes(tmp_path)


def test_symbolic_links_are_counted_and_not_followed(tmp_path):
    data = folder(tmp_path / "data", a=1, b=1)
    write(tmp_path / "secret.png", PNG)
    (data / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "c").symlink_to(data / "a")
    (data / "a" / "loop").symlink_to(data)
    assert contents(data) == {"train": {"a": ["a/000.png"], "b": ["b/000.png"]}}
    assert "3 symbolic links are not followed" in notes(data)


def test_a_pipe_with_the_name_of_an_image_is_listed_for_the_scan_to_refuse(tmp_path):
    folder(tmp_path, a=1, b=1)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert "a/pipe.jpg" in contents(tmp_path)["train"]["a"]


@pytest.mark.parametrize("layout", [{}, {"train": {}}])
def test_no_images_anywhere(tmp_path, layout):
    for name in layout:
        (tmp_path / name).mkdir()
    write(tmp_path / "top.png", PNG)
    with pytest.raises(DataError, match="holds no images in class folders"):
        resolve(str(tmp_path))


def test_strange_names_of_classes_and_files_survive(tmp_path):
    for name in STRANGE:
        for number in range(2):
            write(tmp_path / name / f"{number} {name[:100]}.png", encoded(noise(number), "PNG"))
    dataset = load_dataset(str(tmp_path), val_split=0, seed=0)
    assert sorted(dataset.classes) == sorted(STRANGE)
    assert list(dataset.classes) == sorted(STRANGE, key=os.fsencode)
    train = dataset.splits["train"]
    names = {train.images.name(row) for row in range(len(train.labels))}
    assert names == {f"{name}/{n} {name[:100]}.png" for name in STRANGE for n in range(2)}
    for row, label in enumerate(train.labels):
        assert Path(train.images.name(row)).parts[0] == dataset.classes[label]
        assert train.images.read(row).shape == (3, 8, 8)
    collisions = [note for note in dataset.notes if "differ only in" in note]
    assert len(collisions) == 1
    assert "é" in collisions[0]
    assert "\n" not in collisions[0]


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    folder(tmp_path, a=1, b=1)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"b cannot be read: permission denied"):
        resolve(str(tmp_path))
