"""`train` and `evaluate` measure one model with one rule, and no file of a run grows with classes x classes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import nearkin
from nearkin.cli import run as command

COMMON = {"model": "test_resnet", "threads": 1, "images_per_class": 10, "batch_size": 20}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_train_and_evaluate_give_the_same_numbers(tmp_path, precision):
    """Under bf16 autocast the log loss would differ in the third digit."""
    result = nearkin.train(
        "digits", "ce", precision=precision, epochs=1, out=tmp_path / "run", **COMMON
    )
    again = nearkin.evaluate(tmp_path / "run", cache=False)
    tolerance = 1e-12 if precision == "fp64" else 1e-6
    assert again.top1 == result.metrics["top1"]
    assert again.log_loss == pytest.approx(result.metrics["log_loss"], rel=tolerance)
    cached = [nearkin.evaluate(tmp_path / "run") for _ in range(2)][1]
    assert cached.members[0].cached
    assert cached.log_loss == again.log_loss
    assert again.confusion_file == tmp_path / "run" / "confusion-test.csv"


def test_the_averaged_weights_are_validated(tmp_path):
    """They are what the run gives, so the journal has their log loss and not that of the trained ones."""
    run = nearkin.train("digits", "ce", ema=0.999, epochs=2, out=tmp_path / "run", **COMMON).run
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    best = [line for line in lines if line["kind"] == "validation" and line["best"]][-1]
    found = nearkin.evaluate(run, split="val", cache=False)
    assert found.log_loss == pytest.approx(best["log_loss"], rel=1e-5)
    assert found.top1 == best["top1"]


def test_nothing_is_computed_under_autocast(tmp_path, monkeypatch):
    """Validation and test, in training with bf16."""
    from nearkin.evaluation import evaluator

    seen = []
    plain = evaluator.mean_probabilities

    def watched(logits, images):
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return plain(logits, images)

    monkeypatch.setattr(evaluator, "mean_probabilities", watched)
    nearkin.train("digits", "ce", precision="bf16", epochs=1, out=tmp_path / "run", **COMMON)
    assert set(seen) == {(torch.float32, False)}
    assert len(seen) > 6, "validation and test"


CLASSES = 2000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run on 2 000 classes of one training and one validation image each, and its data."""
    root = tmp_path_factory.mktemp("many")
    rows = ["path,label,split"]
    (root / "images").mkdir()
    draw = np.random.default_rng(0)
    for number in range(CLASSES):
        for split in ("train", "val"):
            name = f"images/{number}-{split}.png"
            pixels = draw.integers(0, 256, (4, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
            rows.append(f"{name},c{number:04d},{split}")
    (root / "data.csv").write_text("\n".join(rows) + "\n")
    options = {"model": "test_resnet", "threads": 1, "workers": 0, "batch_size": 500}
    nearkin.train(
        root / "data.csv", "ce", epochs=1, image_size=8, channels=1, out=root / "run", **options
    )
    return root


def test_many_classes_leave_small_files(many):
    run = many / "run"
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert any(json.loads(line)["kind"] == "validation" for line in lines)
    assert max(map(len, lines)) < 2000
    # 2 000 class names of 8 bytes; a dense matrix would add 8 MB.
    assert (run / "model.json").stat().st_size < 100_000
    metrics = json.loads((run / "model.json").read_text())["metrics"]
    totals = {"n", "top1", "interval", "top5", "log_loss", "ece", "macro", "most_confused"}
    assert set(metrics) == totals | {"split"}
    assert set(metrics["most_confused"]) == {"true", "predicted", "images"}
    with (run / "confusion-val.csv").open(newline="") as file:
        counts = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in counts) == CLASSES
    with (run / "predictions.csv").open(newline="") as file:
        pairs = {(row["label"], row["predicted"]) for row in csv.DictReader(file)}
    assert {(row["true"], row["predicted"]) for row in counts} == pairs


def test_many_classes_are_shown_on_a_page(many, capsys, monkeypatch):
    from nearkin.evaluation import ensemble

    monkeypatch.setattr(ensemble, "LARGEST", CLASSES**2 - 1)
    run = str(many / "run")
    assert command(["evaluate", run]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) < 60
    assert str(many / "run" / "confusion-val.csv") in shown.out
    assert str(many / "run" / "classes-val.csv") in shown.out
    assert "2000 images x 2000 classes are too many" in shown.err
    assert not (many / "run" / "cache").exists()
    monkeypatch.setattr(ensemble, "LARGEST", CLASSES**2)
    assert command(["evaluate", run]) == 0
    kept = capsys.readouterr()
    assert (kept.out, "too many" in kept.err) == (shown.out, False)
    assert command(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["members"][0]["cached"]
    assert "confusion" not in found
    assert len(found["per_class"]) == CLASSES


def test_other_evaluations_do_not_replace_the_files_of_the_first(many):
    run = many / "run"
    before = (run / "confusion-val.csv").read_bytes()
    flipped = nearkin.evaluate(run, tta="flip")
    other = nearkin.evaluate(run, many / "data.csv", split="train")
    files = {flipped.confusion_file, other.confusion_file, run / "confusion-val.csv"}
    assert len(files) == 3
    assert all(file.is_file() and file.parent == run for file in files)
    assert (run / "confusion-val.csv").read_bytes() == before


def test_a_run_folder_that_cannot_be_written_is_a_note(many, monkeypatch):
    from nearkin.evaluation import metrics
    from nearkin.files import SaveFailed

    def fail(path, header, rows):
        raise SaveFailed(f"{path} could not be written")

    monkeypatch.setattr(metrics, "write_csv", fail)
    found = nearkin.evaluate(many / "run", cache=False)
    assert found.confusion_file is None
    assert found.classes_file is None
    assert any("could not be written" in note for note in found.notes)
    assert sum(row.images for row in found.confusion) == CLASSES
