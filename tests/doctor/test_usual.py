"""`nearkin doctor PHOTOS` as it is given, with the packaged network."""

from __future__ import annotations

import csv

from PIL import Image
from tests.training.test_photos import write_photo

from nearkin.cli import run
from nearkin.evaluation.evaluator import Evaluator

KINDS = ("across", "down", "slanted")


def test_wrong_labels_and_a_copy_are_found_and_features_are_kept(tmp_path, monkeypatch, capsys):
    """Two photos of each kind lie in another folder, and one photo was saved again at a lower quality."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "cache"))
    planted = set()
    for label, kind in enumerate(KINDS):
        for number in range(20):
            write_photo(tmp_path / "photos" / kind / f"{number}.jpg", label, number)
        other = KINDS[(label + 1) % 3]
        for number in (20, 21):
            name = f"{other}/{kind}{number}.jpg"
            write_photo(tmp_path / "photos" / name, label, number)
            planted.add(f"photos/{name}")
    original, again = (tmp_path / "photos/across" / name for name in ("0.jpg", "again.jpg"))
    Image.open(original).save(again, quality=90)
    words = ["doctor", "photos", "--no-forecast", "--device", "cpu"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    with (tmp_path / "doctor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    suspicious = {row["path"] for row in rows if row["finding"] == "suspicious-labels"}
    assert len(suspicious & planted) >= 5
    assert len(suspicious - planted) <= 1
    copies = {row["path"] for row in rows if row["finding"] == "near-copies"}
    assert copies == {"photos/across/0.jpg", "photos/across/again.jpg"}

    def forbidden(*_):
        raise AssertionError("features are computed again")

    monkeypatch.setattr(Evaluator, "features", forbidden)
    assert run(words) == 0
    assert capsys.readouterr().out == shown
