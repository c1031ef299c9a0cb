"""Who is picked: the best of those that are better than cross-entropy on validation, else cross-entropy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.pictures import write_classes

from nearkin.comparison import pick
from nearkin.comparison.results import Scores
from nearkin.comparison.splits import with_validation_in_training
from nearkin.data.dataset import load_dataset
from nearkin.data.sources.resolve import resolve

IMAGES, SEEDS = 400, 5


def scores(hits, seed):
    """So many right answers, other ones at another seed."""
    draw = np.random.default_rng(seed)
    right = np.zeros(IMAGES, bool)
    right[draw.permutation(IMAGES)[:hits]] = True
    names = tuple(map(str, range(IMAGES)))
    predicted = tuple("a" if each else "b" for each in right)
    return Scores(names, ("a",) * IMAGES, predicted, np.where(right, 0.9, 0.1))


@pytest.mark.parametrize(
    ("hits", "winner"),
    [
        ({"ce": 200, "supcon": 320, "cone": 360}, "cone"),
        ({"ce": 200, "supcon": 320, "cone": 100}, "supcon"),
        ({"ce": 320, "supcon": 200, "cone": 100}, "ce"),
        ({"ce": 300, "supcon": 301, "cone": 300}, "ce"),
    ],
)
def test_the_winner(monkeypatch, hits, winner):
    assert picked(monkeypatch, hits) == winner


def picked(monkeypatch, hits, idle=(), images=IMAGES):
    runs = [
        SimpleNamespace(
            entry=name,
            seed=seed,
            state="finished",
            folder=f"{name}-{seed}",
            epochs=0 if name in idle else 3,
        )
        for name in hits
        for seed in range(SEEDS)
    ]

    def validated(path, data):
        assert data is None
        name, seed = path.name.split("-")
        found = scores(hits[name], int(seed))
        return Scores(*(each[:images] for each in found))

    monkeypatch.setattr(pick, "_validation", validated)
    return pick._winner(SimpleNamespace(folder=Path("x"), runs=runs, baseline="ce"), "digits")


def test_a_probe_is_not_picked(monkeypatch):
    """Runs without an epoch say nothing about their objective, those of the baseline neither."""
    hits = {"ce": 200, "supcon": 320, "cone": 360}
    assert picked(monkeypatch, hits, idle=["cone"]) == "supcon"
    assert picked(monkeypatch, hits, idle=["ce"]) == "ce"


@pytest.mark.parametrize("images", [1, 7])
def test_a_few_validation_images_pick_the_baseline(monkeypatch, images):
    assert picked(monkeypatch, {"ce": 0, "supcon": 400}, images=images) == "ce"


def test_validation_images_join_a_limited_training(tmp_path):
    """Two images of each class to train on, and a fifth of the ten that were there first to validate with."""
    root = write_classes(tmp_path / "photos" / "train", each=10).parent
    write_classes(root / "test", each=3)
    settings = SimpleNamespace(images_per_class=2, val_split=0.2, split_seed=None)
    table = tmp_path / "picked.csv"
    assert pick._written(settings, {"data": str(root)}, 5, table)
    parts = resolve(str(table)).parts
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 8, "test": 6}
    options = {"val_split": 0.2, "seed": 5, "images_per_class": 2}
    own = load_dataset(str(root), **options).splits
    wanted = {own[name].images.path(row) for name in ("train", "val") for row in range(4)}
    files = parts["train"].images
    assert {files.path(row) for row in range(8)} == wanted


def test_validation_images_join_the_training(tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / "photos" / split, each=3)
    table = tmp_path / "picked.csv"
    assert with_validation_in_training(resolve(str(tmp_path / "photos")), table)
    parts = resolve(str(table)).parts
    assert set(parts) == {"train", "test"}
    assert (len(parts["train"].labels), len(parts["test"].labels)) == (12, 6)


def test_a_step_up_from_a_linked_folder_leads_where_the_system_leads(tmp_path):
    for split in ("val", "train"):
        write_classes(tmp_path / "far" / "photos" / split, each=3)
    (tmp_path / "far" / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    table = tmp_path / "picked.csv"
    assert with_validation_in_training(resolve(f"{tmp_path}/link/../photos"), table)
    assert len(resolve(str(table)).parts["train"].labels) == 12
