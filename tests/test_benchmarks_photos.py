"""The table of photos is made in pieces and says what is missed; plain fine-tuning learns; a search goes on."""

from __future__ import annotations

import sys

import pytest
from benchmarks import photo_search, photos, plain_finetuning, search
from tests.training.test_photos import write_photo

from nearkin.data.dataset import load_dataset


def few(root):
    for label in range(3):
        write_photo(root / photos.GENERATED / str(label) / "0.jpg", label, 0)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The runs that were made, instead of running them."""
    runs = []

    def run(root, cell, method, seed, core=None):
        assert (core is not None) == (method == "plain")
        runs.append((cell, method, seed))
        if cell == photos.GENERATED:
            assert len(list(root.rglob("*.jpg"))) == 3
        top1 = {"probe": 0.6, "default": 0.7 + 0.02 * seed, "plain": 0.5}[method]
        values = (cell, method, seed, top1, top1, 10.0 + seed, "")
        return dict(zip(photos.FIELDS, values, strict=True))

    monkeypatch.setattr(photos, "RESULTS", tmp_path / "photos.csv")
    monkeypatch.setattr(photos, "_run", run)
    monkeypatch.setattr(photos, "generate", few)
    monkeypatch.setenv("NEARKIN_BENCH_PHOTOS", str(tmp_path))
    return runs


def test_what_is_there_is_not_run_again(made, monkeypatch):
    monkeypatch.setenv("NEARKIN_BENCH_SEEDS", "1")
    monkeypatch.setenv("NEARKIN_BENCH_METHODS", "probe")
    photos.table()
    assert made == [(cell, "probe", 0) for cell in (photos.GENERATED, *photos.CELLS)]
    monkeypatch.setenv("NEARKIN_BENCH_METHODS", "probe,default")
    photos.table()
    assert made[5:] == [(cell, "default", 0) for cell in photos.CELLS]
    monkeypatch.delenv("NEARKIN_BENCH_PHOTOS")
    assert len(photos.table().rows) == 10
    assert len(made) == 9


def test_means_and_targets(made):
    rows = {row.what: row for row in photos.table().rows}
    five = rows["grocery81, 5 per class: default"]
    assert (five.ratio, five.median) == (pytest.approx(72), pytest.approx(2))
    assert (five.target, five.missed, five.runs, five.ours) == (69.0, False, 3, 12.0)
    assert rows["grocery81, all: default"].missed
    assert rows["clothing10, all: default"].target == pytest.approx(65)
    assert rows["clothing10, all: plain"].target is None
    above = rows["clothing10, all: default above plain"]
    assert (above.ratio, above.missed) == (pytest.approx(22), False)
    first = rows["2 500 generated photos: first model"]
    assert (first.ratio, first.target, first.missed) == (10.0, 180.0, False)
    longest = rows["longest default run"]
    assert (longest.ratio, longest.target, longest.missed) == (12.0, 1080.0, False)


def test_a_search_appends_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_search, "RESULTS", tmp_path / "search.csv")
    monkeypatch.setenv("NEARKIN_BENCH_PHOTOS", str(tmp_path))
    done = []

    def run(self, cell, name, core):
        done.append(name)
        values = ("nearkin", cell, 0, name, "", 0.5, 1.0, 2531, 2.0)
        return dict(zip(search.FIELDS, values, strict=True))

    monkeypatch.setattr(search.Search, "run", run)
    monkeypatch.setattr(sys, "argv", ["photo_search", "default"])
    photo_search.main()
    monkeypatch.setattr(sys, "argv", ["photo_search", "default", "ce"])
    photo_search.main()
    assert done == ["default"] * 5 + ["ce"] * 5
    assert len((tmp_path / "search.csv").read_text().splitlines()) == 11


def test_the_search_judges_by_images_that_do_not_train(tmp_path):
    for split, number in (("train", 10), ("val", 2), ("test", 3)):
        for label, kind in enumerate("ab"):
            for place in range(number):
                write_photo(tmp_path / split / kind / f"{place}.jpg", label, place)
    for images, kept in ((3, 3), (None, 8)):
        rows = list(search.held_out(tmp_path, images))
        train = [path for path, _, split in rows if split == "train"]
        judged = [path for path, _, split in rows if split == "test"]
        assert (len(train), len(judged)) == (2 * kept, 2 * (12 - kept))
        assert not set(train) & set(judged)
        assert not any("/test/" in path for path in train + judged)


@pytest.mark.slow
def test_plain_fine_tuning_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_finetuning, "SIDE", 64)
    for split, numbers in (("train", range(12)), ("val", range(12, 16))):
        for label, kind in enumerate("abc"):
            for number in numbers:
                write_photo(tmp_path / split / kind / f"{number}.jpg", label, number)
    data = load_dataset(str(tmp_path))
    network, epochs = plain_finetuning.trained(data, 1e-3, seconds=20.0, seed=0)
    assert epochs >= 1
    assert plain_finetuning.accuracy(network, data.splits["val"], 64) > 0.6
