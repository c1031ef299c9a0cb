"""A model's own data give its own splits again; other data are taken as they are."""

from __future__ import annotations

import os
import unicodedata

import pytest
from image_files import folder, write

from nearkin.data.dataset import load_dataset, load_for_evaluation
from nearkin.data.look import BadImages
from nearkin.errors import DataError

SEED, SHARE = 5, 0.3


def names(split) -> list[str]:
    return [split.images.name(row) for row in range(len(split.labels))]


def evaluate(data, classes, **options):
    return load_for_evaluation(
        os.fspath(data),
        **({"classes": classes, "channels": 3, "seed": SEED, "val_split": SHARE} | options),
    )


@pytest.fixture(params=["error", "skip"])
def trained(request, tmp_path):
    """A flat folder that was trained on, under both policies for bad images."""
    folder(tmp_path, a=20, b=15, c=9)
    if request.param == "skip":
        for name in ("a/003.png", "b/014.png", "c/000.png"):
            write(tmp_path / name, b"no image")
    dataset = load_dataset(
        str(tmp_path), seed=SEED, val_split=SHARE, images_per_class=5, bad_images=request.param
    )
    return tmp_path, dataset, request.param


def test_own_data_give_the_same_rows(trained):
    root, dataset, policy = trained
    for split in (None, "val"):
        found = evaluate(root, dataset.classes, split=split, bad_images=policy)
        assert found.split.name == "val"
        assert names(found.split) == names(dataset.splits["val"])
        assert found.split.labels.tolist() == dataset.splits["val"].labels.tolist()
    train = evaluate(
        root, dataset.classes, split="train", images_per_class=5, bad_images=policy
    ).split
    assert names(train) == names(dataset.splits["train"])


def test_digits_give_their_splits_again():
    dataset = load_dataset("digits", seed=SEED)
    for split in ("train", "val", "test"):
        found = load_for_evaluation(
            "digits", classes=dataset.classes, channels=1, split=split, seed=SEED
        )
        assert names(found.split) == names(dataset.splits[split])
    assert load_for_evaluation("digits", classes=dataset.classes, channels=1).split.name == "test"


def test_a_seed_of_the_split_wins_over_that_of_the_run():
    options = {"seed": 3, "split_seed": 7, "images_per_class": 9}
    dataset = load_dataset("digits", **options)
    for split in ("val", "train"):
        found = load_for_evaluation(
            "digits", classes=dataset.classes, channels=1, split=split, **options
        )
        assert names(found.split) == names(dataset.splits[split])


def test_other_data_without_splits_are_one_test_split(tmp_path):
    folder(tmp_path, b=3, c=2)
    found = evaluate(tmp_path, ("a", "b", "c"), own=False)
    assert found.split.name == "test"
    assert found.split.labels.tolist() == [1, 1, 1, 2, 2]
    assert "1 class has no image in the split test: a" in found.notes


def test_a_single_class_can_be_evaluated(tmp_path):
    folder(tmp_path, b=3)
    assert evaluate(tmp_path, ("a", "b"), own=False).split.labels.tolist() == [1, 1, 1]


def test_other_data_with_splits_give_test_else_val(tmp_path):
    folder(tmp_path, **{"train/a": 9, "val/a": 2, "test/a": 1})
    assert evaluate(tmp_path, ("a", "b"), own=False).split.name == "test"
    (tmp_path / "test" / "a" / "000.png").unlink()
    assert evaluate(tmp_path, ("a", "b"), own=False).split.name == "val"
    assert len(evaluate(tmp_path, ("a", "b"), own=False, split="train").split.labels) == 9


def test_data_without_train_can_be_evaluated(tmp_path):
    folder(tmp_path, **{"test/a": 2, "val/a": 1})
    assert evaluate(tmp_path, ("a", "b")).split.labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({"split": "test"}, "train, val"),
        ({"split": "val", "val_split": 0}, "train"),
        ({"split": "dev"}, "train, val"),
    ],
)
def test_a_missing_split_names_those_there(tmp_path, options, there):
    folder(tmp_path, a=5, b=5)
    with pytest.raises(DataError, match=rf"no split {options['split']}, only {there}\."):
        evaluate(tmp_path, ("a", "b"), **options)
    with pytest.raises(DataError, match="have no splits; leave out --split"):
        evaluate(tmp_path, ("a", "b"), split="val", own=False)


def test_nothing_held_out_leaves_nothing_to_judge(tmp_path):
    folder(tmp_path, a=5, b=5)
    with pytest.raises(DataError, match="neither a test nor a val split"):
        evaluate(tmp_path, ("a", "b"), val_split=0)


def test_a_class_that_the_model_does_not_know(tmp_path):
    folder(tmp_path, **{"train/z": 2, "test/a": 1, "test/y": 1})
    with pytest.raises(DataError, match="the training has not: y"):
        evaluate(tmp_path, ("a", "b"))
    (tmp_path / "test" / "y" / "000.png").unlink()
    assert evaluate(tmp_path, ("a", "b")).split.labels.tolist() == [0]  # train is not looked at


@pytest.mark.parametrize(
    ("trained", "found"), [("Cat", "cat"), ("Müll", unicodedata.normalize("NFD", "Müll"))]
)
def test_a_class_that_differs_in_case_or_unicode_form_only_is_named(tmp_path, trained, found):
    folder(tmp_path, **{f"train/{trained}": 2, "train/b": 2, f"test/{found}": 1})
    with pytest.raises(DataError, match=f"{trained} in the training differs only in case"):
        load_dataset(str(tmp_path), val_split=0)


def test_bad_images_follow_the_policy(tmp_path):
    folder(tmp_path, **{"train/a": 2, "test/a": 2})
    write(tmp_path / "test" / "a" / "000.png", b"")
    write(tmp_path / "train" / "a" / "000.png", b"")
    with pytest.raises(BadImages, match="1 of 2 images"):
        evaluate(tmp_path, ("a", "b"))
    found = evaluate(tmp_path, ("a", "b"), bad_images="skip")
    assert names(found.split) == ["test/a/001.png"]
    assert [image.path for image in found.bad] == [str(tmp_path / "test/a/000.png")]
