"""Folders of class folders: what is a class, what is a split, what is left out and said so."""

from __future__ import annotations

import contextlib
import gc
import os
import tracemalloc
from pathlib import Path

import pytest
from image_files import encoded, folder, noise, write

from nearkin.data.dataset import load_dataset
from nearkin.data.sources import folders
from nearkin.data.sources.folders import find_images
from nearkin.data.sources.folders import list_folder as resolve_folder
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


@pytest.mark.parametrize("second", ["train_2021", "Train 2021", "more_training"])
def test_a_second_folder_for_a_split_is_not_left_out(tmp_path, second):
    inside = {f"{name}/{kind}": 1 for name in ("train_2020", "test_2020", second) for kind in "ab"}
    folder(tmp_path, **inside)
    with pytest.raises(
        DataError, match=f"two folders for the split train, train_2020 and {second}"
    ):
        resolve(str(tmp_path))
    (tmp_path / second).rename(tmp_path / "extra")
    assert set(contents(tmp_path)) == {"train", "test"}


def test_another_folder_beside_a_split_of_the_very_name_is_ignored(tmp_path):
    folder(tmp_path, **{"train/a": 1, "train/b": 1, "test/a": 1, "train_small/a": 1})
    assert set(contents(tmp_path)) == {"train", "test"}
    assert "1 folder beside the splits is ignored: train_small" in notes(tmp_path)


def test_images_of_a_split_without_class_folders_are_not_called_none(tmp_path):
    folder(tmp_path, **{"train/a": 1, "train/b": 1, "test": 3})
    assert set(contents(tmp_path)) == {"train"}
    told = "1 split has images but no class folders, and is ignored; predict takes them: test"
    assert told in notes(tmp_path)


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
    assert "ignored: 1 .txt file" in notes(tmp_path)


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


@pytest.fixture
def without_heic(monkeypatch):
    monkeypatch.setattr(folders, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_heic")
def test_suffixes_in_any_case(tmp_path):
    good = "a.JPG b.Jpeg c.png d.WEBP e.bmp f.tif g.TIFF h.gif i.jfif j.JPE k.avif".split()
    for name in [*good, "l.txt", "m.svg", "n", "o.png.bak", "p.heic", "q.HEIC"]:
        write(tmp_path / "a" / name, PNG)
    assert contents(tmp_path)["train"]["a"] == [f"a/{name}" for name in good]
    found = notes(tmp_path)
    for words in ("2 .heic files", "1 .txt file", "1 .svg file", "1 file without a suffix"):
        assert words in found
    assert "to read .heic, in a copy of nearkin run: uv sync --extra heic" in found


def test_heic_is_listed_where_pillow_can_read_it(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs the extra heic")
    write(tmp_path / "a" / "x.heic", PNG)
    assert contents(tmp_path)["train"]["a"] == ["a/x.heic"]


def test_links_are_followed_wherever_they_lead(tmp_path):
    elsewhere = folder(tmp_path / "elsewhere", one=2, two=1)
    data = folder(tmp_path / "data", a=1)
    (data / "a" / "link.png").symlink_to(elsewhere / "two" / "000.png")
    (data / "b").symlink_to(elsewhere / "one")
    assert contents(data) == {
        "train": {"a": ["a/000.png", "a/link.png"], "b": ["b/000.png", "b/001.png"]}
    }
    assert notes(data) == ""
    assert len(load_dataset(str(data), val_split=0).splits["train"].labels) == 4


def test_the_root_may_be_a_link(tmp_path):
    folder(tmp_path / "data", a=1, b=1)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert contents(tmp_path / "link") == contents(tmp_path / "data")


def test_broken_links_are_named(tmp_path):
    folder(tmp_path, a=1, b=1)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c").symlink_to(tmp_path / "no folder")
    (tmp_path / "d").symlink_to("d")
    assert sorted(contents(tmp_path)["train"]) == ["a", "b"]
    assert "ignored: 3 broken links (" in notes(tmp_path)
    for name in ("a/gone.png", "c", "d"):
        assert name in notes(tmp_path)


@pytest.mark.timeout(20)
def test_loops_of_links_end_and_show_each_image_once(tmp_path):
    """`train/a/loop` leads to `train`, so that following it once would put the images of b into a."""
    data = folder(tmp_path / "data", **{"train/a": 1, "train/b": 1, "train/a/deep": 1})
    for target in (data, data / "train", data / "train" / "a"):
        (data / "train" / "a" / "deep" / f"to {target.name}").symlink_to(target)
    (data / "train" / "c").symlink_to(data)
    assert contents(data) == {
        "train": {
            "a": ["train/a/000.png", "train/a/deep/000.png"],
            "b": ["train/b/000.png"],
        }
    }
    assert "4 links to folders above them" in notes(data)


def test_folders_that_link_to_each_other_show_each_image_once_in_a_class(tmp_path):
    """A path without a link is preferred to one with, and what is read does not depend on the file system's order."""
    names = "abcdefgh"
    data = folder(tmp_path / "data", **dict.fromkeys(names, 2), **{"a/own": 1})
    (data / "a" / "again").symlink_to(data / "a" / "own")
    for one in names:
        for other in names:
            if one != other:
                (data / one / f"to {other}").symlink_to(data / other)
    (found,) = contents(data).values()
    assert [len(found[name]) for name in names] == [17] * 8
    assert {"a/000.png", "a/own/000.png", "a/to b/000.png"} <= set(found["a"])
    assert "b/to a/own/000.png" in found["b"]
    assert "links to folders that are read already" in notes(data)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "tst"),
        ("trn", "test"),
        ("seg_train", "seg_test"),
        ("cars-Train", "cars-Test"),
        ("train_images", "test_images"),
        ("train2017", "test2017"),
    ],
)
def test_usual_names_of_splits_whatever_their_case(tmp_path, train, test):
    folder(tmp_path, **{f"{t}/{c}": 2 for t in (train, test) for c in ("cat", "dog")})
    found = contents(tmp_path)
    assert {split: sorted(classes) for split, classes in found.items()} == {
        "train": ["cat", "dog"],
        "test": ["cat", "dog"],
    }


def test_splits_of_an_archive_inside_folders_of_their_own_name(tmp_path):
    layout = {"seg_train/seg_train/a": 1, "seg_train/seg_train/b": 1, "seg_test/seg_test/a": 1}
    folder(tmp_path, **layout, **{"seg_pred/seg_pred": 2})
    assert {s: sorted(c) for s, c in contents(tmp_path).items()} == {
        "train": ["a", "b"],
        "test": ["a"],
    }
    assert "1 folder beside the splits is ignored: seg_pred" in notes(tmp_path)


def test_classes_whose_names_hold_such_a_word_stay_classes(tmp_path):
    folder(tmp_path, bullet_train=1, test_tube=1, valid_ticket=1, steam_train=1)
    assert len(contents(tmp_path)["train"]) == 4


@pytest.mark.parametrize("above", ["", "train/"])
def test_classes_that_all_hold_the_same_folders_are_asked_about(tmp_path, above):
    for part in ("Phase1", "Phase2", "Held out"):
        folder(tmp_path / above / part, cat=1, dog=1)
    with pytest.raises(DataError) as caught:
        resolve(str(tmp_path))
    message = str(caught.value)
    for word in ("Held out, Phase1, Phase2", "cat, dog", "train, val and test", "table"):
        assert word in message


def test_classes_may_all_hold_one_folder_of_the_same_name(tmp_path):
    folder(tmp_path, **{"n01/images": 2, "n02/images": 2})
    assert sorted(contents(tmp_path)["train"]) == ["n01", "n02"]


NOTHING = {
    "heic": (["a/1.heic", "a/2.heic", "b/3.heic"], ["3 .heic files", "uv sync --extra heic"]),
    "other files": (["a/1.txt", "b/2.pdf"], ["1 .txt file", "1 .pdf file"]),
    "no classes": (["1.png", "2.png"], ["2 images outside class folders", "CLASS/image.jpg"]),
    "hidden": ([".git/1.png"], ["1 hidden file or folder"]),
    "a split": (["train/1.png", "train/2.jpg"], ["2 images outside class folders"]),
}


@pytest.mark.usefixtures("without_heic")
@pytest.mark.parametrize("case", NOTHING)
def test_a_folder_without_images_says_what_it_holds(tmp_path, case):
    files, words = NOTHING[case]
    for name in files:
        write(tmp_path / name, PNG)
    with pytest.raises(DataError, match="holds no images in class folders, only ") as caught:
        resolve(str(tmp_path))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_broken_links_alone_are_said(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").symlink_to("nowhere")
    for call in (resolve, find_images):
        with pytest.raises(DataError, match=r"1 broken link \(a/1.png\)"):
            call(str(tmp_path))


@pytest.mark.usefixtures("without_heic")
def test_images_at_any_depth_are_found_as_training_finds_them(tmp_path):
    data = folder(tmp_path / "data", a=1, **{"b/deep": 1, "a/3.jpg": 1, ".ipynb_checkpoints": 1})
    folder(data, **{"__MACOSX": 1, "a/@eaDir": 1})
    write(data / "top.jfif", PNG)
    write(data / "x.heic", PNG)
    files, said = find_images(str(data))
    names = [files.name(row) for row in range(len(files))]
    assert names == ["a/000.png", "a/3.jpg/000.png", "b/deep/000.png", "top.jfif"]
    assert list(files) == [str(data / name) for name in names]
    trained = contents(data)["train"]
    assert sorted(n for paths in trained.values() for n in paths) == names[:-1]
    assert "3 hidden files or folders are ignored" in said
    assert any("1 .heic file" in note for note in said)


def test_listing_takes_little_memory(tmp_path, monkeypatch):
    """200 000 names as of ImageNet, from folders that are not really there."""

    class Entry:
        def __init__(self, path, is_folder):
            self.name, self.path, self._folder = os.path.basename(path), path, is_folder

        def is_dir(self):
            return self._folder

        def is_symlink(self):
            return False

    gc.collect()  # caches that other tests left are removed with the real scandir

    @contextlib.contextmanager
    def scandir(path):
        if path == "root":
            yield (Entry(f"root/n{c:08}", True) for c in range(200))
        else:
            name = os.path.basename(path)
            yield (Entry(f"{path}/{name}_{i:05}.JPEG", False) for i in range(1000))

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(folders._Walk, "_identity", lambda self, folder: (0, hash(folder)))
    tracemalloc.start()
    try:
        part = resolve_folder("root").parts["train"]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(part.images) == 200_000
    assert kept < 60 * 200_000
    assert peak < 400 * 200_000


def test_a_pipe_with_the_name_of_an_image_is_listed_for_the_scan_to_refuse(tmp_path):
    folder(tmp_path, a=1, b=1)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert "a/pipe.jpg" in contents(tmp_path)["train"]["a"]


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
