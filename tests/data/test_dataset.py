"""One class map for all splits, splits that are pure functions of labels and seed, and what is refused."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, folder, noise, write

from nearkin.data.dataset import choose, limited, load_dataset, names_of, sizes_of, stratified
from nearkin.data.decode import BadImage
from nearkin.data.look import BadImages, write_bad_files
from nearkin.data.sources.resolve import resolve
from nearkin.errors import ConfigError, DataError


def load(root, **options):
    return load_dataset(str(root), **({"seed": 0, "val_split": 0} | options))


def named(dataset, split: str) -> list[tuple[str, str]]:
    """(image, class name) of every row: what a label means, whatever its number."""
    found = dataset.splits[split]
    return [
        (found.images.name(row), dataset.classes[label]) for row, label in enumerate(found.labels)
    ]


def test_classes_are_numbered_by_train_in_every_split(tmp_path):
    folder(
        tmp_path,
        **{
            "train/cat": 2,
            "train/dog": 2,
            "train/eel": 2,
            "val/dog": 1,
            "val/eel": 1,
            "test/eel": 1,
        },
    )
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog", "eel")
    assert dataset.splits["val"].labels.tolist() == [
        1,
        2,
    ]  # each folder's own numbering would say 0, 1
    assert dataset.splits["test"].labels.tolist() == [2]
    assert all(
        name.split("/")[1] == label
        for split in dataset.splits
        for name, label in named(dataset, split)
    )
    assert "1 class has no image in the split val: cat" in dataset.notes
    assert "2 classes have no image in the split test: cat, dog" in dataset.notes


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_train_has_not_is_refused(tmp_path, split):
    folder(tmp_path, **{"train/a": 2, "train/b": 2, f"{split}/a": 1, f"{split}/zebra": 1})
    with pytest.raises(
        DataError, match=rf"split {split} has 1 class that the training has not: zebra"
    ) as caught:
        load(tmp_path)
    assert caught.value.code == 3


def test_given_classes_keep_their_numbers(tmp_path):
    folder(tmp_path, a=2, c=2)
    dataset = load(tmp_path, classes=("c", "b", "a"))
    assert dataset.classes == ("c", "b", "a")
    assert dataset.splits["train"].labels.tolist() == [2, 2, 0, 0]
    with pytest.raises(DataError, match="the training has not: c"):
        load(tmp_path, classes=("a", "b"))


def test_one_class_is_too_few(tmp_path):
    folder(tmp_path, a=5)
    with pytest.raises(DataError, match="one class only, a"):
        load(tmp_path)


def test_a_folder_around_the_classes_is_told(tmp_path):
    """As archives are often packed."""
    folder(tmp_path / "one", **{"flowers/daisy": 2, "flowers/rose": 3})
    folder(tmp_path / "two", **{"set/train/a": 2, "set/train/b": 2, "set/test/a": 1})
    folder(tmp_path / "deep", **{"a/x": 2})
    for data, words in (
        ("one", "flowers; training needs two; if daisy, rose are the classes or splits, give"),
        (
            "two",
            "set; training needs two; if test, train are the classes or splits, give the folder set",
        ),
        ("deep", r"one class only, a; training needs two\."),
    ):
        with pytest.raises(DataError, match=words):
            load(tmp_path / data)


def test_without_train_the_splits_there_are_named(tmp_path):
    folder(tmp_path, **{"val/a": 1, "val/b": 1, "test/a": 1})
    with pytest.raises(DataError, match="no split train, only val, test"):
        load(tmp_path)


def test_a_class_with_one_image_stays_in_train_with_a_note(tmp_path):
    folder(tmp_path, a=10, b=10, lone=1)
    dataset = load(tmp_path, val_split=0.4)
    assert ("lone/000.png", "lone") in named(dataset, "train")
    assert any("single training image: lone" in note for note in dataset.notes)
    assert any("no image in the split val: lone" in note for note in dataset.notes)


def test_an_error_only_where_a_split_needs_two(tmp_path):
    folder(tmp_path, a=1, b=1)
    assert len(load(tmp_path).splits["train"].labels) == 2
    with pytest.raises(DataError, match="No class has two training images"):
        load(tmp_path, val_split=0.1)


def test_a_val_split_of_its_own_is_left_alone(tmp_path):
    folder(tmp_path, **{"train/a": 9, "train/b": 9, "valid/a": 1, "valid/b": 1})
    dataset = load(tmp_path, val_split=0.5)
    assert len(dataset.splits["train"].labels) == 18
    assert dataset.splits["val"].name == "val"
    assert len(dataset.splits["val"].labels) == 2


def test_held_out_images_leave_train(tmp_path):
    folder(tmp_path, a=10, b=30)
    dataset = load(tmp_path, val_split=0.2)
    train, val = named(dataset, "train"), named(dataset, "val")
    assert not set(train) & set(val)
    assert len(set(train) | set(val)) == 40
    assert [label for _, label in val] == ["a"] * 2 + ["b"] * 6
    assert named(load(tmp_path, val_split=0.2), "val") == val
    assert named(load(tmp_path, val_split=0.2, seed=1), "val") != val
    assert "val" not in load(tmp_path).splits


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=200)
def test_stratification(labels, fraction, seed):
    labels = np.array(labels)
    held = stratified(labels, fraction, seed)
    counts, given_away = np.bincount(labels), np.bincount(labels[held], minlength=labels.max() + 1)
    assert len(set(held.tolist())) == len(held)
    assert held.tolist() == sorted(held.tolist())
    assert ((counts - given_away)[counts > 0] >= 1).all()
    room = np.maximum(counts - 1, 0)
    assert len(held) == min(max(1, int(fraction * len(labels) + 1e-9)), room.sum())
    assert (given_away >= np.minimum(np.floor(fraction * counts - 1e-9), room)).all()
    if (fraction * counts <= room).all():  # nobody else's share to take over
        assert (
            given_away <= np.ceil(fraction * counts + 1e-9) + (fraction * len(labels) < 1)
        ).all()
    assert held.tolist() == stratified(labels, fraction, seed).tolist()


def test_which_images_are_held_out_is_not_a_matter_of_their_place():
    labels = np.repeat([0, 1], 50)
    times = sum(np.bincount(stratified(labels, 0.2, seed), minlength=100) for seed in range(400))
    assert abs(times.sum() - 400 * 20) == 0
    assert times.min() > 40  # of 80 expected; a fair draw leaves +- 5 deviations of 8
    assert times.max() < 120


def test_at_most_n_images_of_a_class(tmp_path):
    folder(tmp_path, a=10, b=4, c=30)
    dataset = load(tmp_path, images_per_class=5, val_split=0.1)
    whole = load(tmp_path, val_split=0.1)
    assert named(dataset, "val") == named(whole, "val")  # chosen after the split
    kept = named(dataset, "train")
    assert set(kept) < set(named(whole, "train"))
    counts = {name: [label for _, label in kept].count(name) for name in "abc"}
    assert counts["a"] == counts["c"] == 5
    assert counts["b"] <= 4
    assert any(f"fewer than 5 training images: b ({counts['b']})" in note for note in dataset.notes)
    assert named(load(tmp_path, images_per_class=5, val_split=0.1), "train") == kept


def test_the_choice_per_class_is_seeded_and_random():
    labels = np.repeat([0, 1, 2], [3, 50, 7])
    kept = limited(labels, 5, 0)
    assert np.bincount(labels[kept]).tolist() == [3, 5, 5]
    assert kept.tolist() == limited(labels, 5, 0).tolist()
    assert kept.tolist() != limited(labels, 5, 1).tolist()
    assert limited(labels, 50, 0).tolist() == list(range(60))


def spoiled(root) -> list[str]:
    """Good images, and one bad one in each of three splits; the paths of the bad ones."""
    folder(root, **{"train/a": 4, "train/b": 4, "val/a": 2, "test/b": 2})
    good = encoded(noise(0), "PNG")
    bad = {"train/a/000.png": b"", "val/a/001.png": good[:-9], "test/b/001.png": b"no image"}
    for name, content in bad.items():
        write(root / name, content)
    return [str(root / name) for name in bad]


def test_bad_images_stop_everything_with_the_whole_list(tmp_path):
    bad = spoiled(tmp_path)
    with pytest.raises(BadImages) as caught:
        load(tmp_path)
    error = caught.value
    assert [image.path for image in error.bad] == bad
    assert str(error).startswith("3 of 12 images cannot be read: ")
    assert "(it is empty)" in str(error)
    assert "--bad-images skip" in str(error)
    assert error.code == 3
    again = type(error)("another text", error.bad)
    assert (str(again), again.bad) == ("another text", error.bad)


@pytest.mark.parametrize("check", ["auto", "full", "headers"])
def test_bad_images_are_left_out_and_never_replaced(tmp_path, check):
    bad = spoiled(tmp_path)
    dataset = load(tmp_path, bad_images="skip", check=check)
    assert [image.path for image in dataset.bad] == bad
    left = {str(tmp_path / n) for split in dataset.splits for n, _ in named(dataset, split)}
    assert len(left) == 9
    assert not left & set(bad)
    assert all(
        name.split("/")[1] == label
        for split in dataset.splits
        for name, label in named(dataset, split)
    )
    assert "3 unreadable images left out" in dataset.notes


def test_when_nothing_can_be_read(tmp_path):
    folder(tmp_path, a=0)
    for name in ("a/x.png", "b/x.png"):
        write(tmp_path / name, b"no image")
    with pytest.raises(DataError, match="No image of the split train can be read"):
        load(tmp_path, bad_images="skip")


def test_without_a_look_files_are_trusted(tmp_path):
    spoiled(tmp_path)
    assert load(tmp_path, check=None).bad == ()


def test_the_choice_of_images_does_not_depend_on_which_are_bad(tmp_path):
    """A bad image takes the place that it would have had; none moves from validation to training for it."""
    folder(tmp_path, a=20, b=20)
    options = {"val_split": 0.25, "images_per_class": 8, "bad_images": "skip"}
    whole = load(tmp_path, **options)
    for name, _ in (named(whole, "train")[3], named(whole, "val")[1]):
        write(tmp_path / name, b"no image")
    spoilt = load(tmp_path, **options)
    for split in ("train", "val"):
        left = named(spoilt, split)
        assert set(left) < set(named(whole, split))
        assert len(left) == len(named(whole, split)) - 1


def test_a_class_without_a_readable_image_is_no_class(tmp_path):
    folder(tmp_path, a=3, b=3, c=1)
    write(tmp_path / "b" / "000.png", b"no image")
    write(tmp_path / "c" / "000.png", b"no image")
    dataset = load(tmp_path, bad_images="skip")
    assert dataset.classes == ("a", "b")
    assert dataset.splits["train"].labels.tolist() == [0, 0, 0, 1, 1]


def test_channels(tmp_path):
    folder(tmp_path, a=1, b=1)
    assert load(tmp_path).channels == 3
    grey = load(tmp_path, channels=1)
    assert grey.channels == 1
    assert grey.splits["train"].images.read(0).shape == (1, 8, 8)
    assert load_dataset("digits", channels=3, seed=0).splits["val"].images.read(0).shape == (
        3,
        8,
        8,
    )
    with pytest.raises(ConfigError, match="--channels 4"):
        load(tmp_path, channels=4)


def test_digests_have_the_values_of_earlier_versions(tmp_path):
    """Runs that were started with them go on, and caches are found."""
    for label in ("a", "b"):
        for number in range(5):
            path = tmp_path / label / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x" * (number + 1))
    listing = resolve(str(tmp_path))
    chosen = choose(listing, channels=3, val_split=0, seed=0, images_per_class=None)
    found = names_of(listing), sizes_of(listing), chosen.fingerprint
    assert [digest[:16] for digest in found] == [
        "898a464a05ee86af",
        "587f18991c4aaacb",
        "67ce8ab2c96b3314",
    ]


def test_the_fingerprint_follows_what_is_trained_on(tmp_path):
    folder(tmp_path, a=6, b=6)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    assert load(tmp_path, val_split=0.5).fingerprint != first
    assert load(tmp_path, images_per_class=3).fingerprint != first
    write(tmp_path / "b" / "000.png", encoded(noise(7, 9, 9), "PNG"))
    second = load(tmp_path).fingerprint
    assert second != first
    (tmp_path / "b").rename(tmp_path / "c")
    assert load(tmp_path).fingerprint not in (first, second)


def test_the_list_of_bad_files_is_read_back_exactly(tmp_path):
    paths = [
        "plain.jpg",
        'comma, "quote".jpg',
        "new\nline\r.jpg",
        "\r\n",
        os.fsdecode(b"\xff\xfe.png"),
        "=1+1",
        " x ",
    ]
    write_bad_files(
        tmp_path / "bad_files.csv", [BadImage(p, f"it is bad, {n}") for n, p in enumerate(paths)]
    )
    with (tmp_path / "bad_files.csv").open(
        encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "reason"], *([p, f"it is bad, {n}"] for n, p in enumerate(paths))]
