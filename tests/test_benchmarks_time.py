"""Time to accuracy is read from the logs of real runs."""

from __future__ import annotations

import json

import pytest
from benchmarks import time_to_accuracy

from nearkin import train


def test_the_first_time_counts():
    curve = {"seconds": [1.0, 2.0, 3.0], "top1": [0.1, 0.5, 0.4]}
    assert time_to_accuracy.reached(curve, 0.4) == 2.0
    assert time_to_accuracy.reached(curve, 0.6) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    small = {"model": "test_resnet", "epochs": 3, "images_per_class": 10, "batch_size": 20}
    folder = tmp_path_factory.mktemp("runs")
    return [train("digits", name, out=folder / name, **small).run for name in ("ce", "supcon")]


def test_a_table_and_the_curves(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["x", *map(str, runs), "--json", str(tmp_path / "t.json")])
    assert time_to_accuracy.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "ce", "supcon"]
    curves = json.loads((tmp_path / "t.json").read_text())
    for curve in curves:
        assert len(curve["seconds"]) == len(curve["top1"]) == 3
        assert 0 < curve["seconds"][0] < curve["seconds"][1] < curve["seconds"][2]


def test_the_picture(runs, tmp_path):
    time_to_accuracy.draw([time_to_accuracy.curve(run) for run in runs], tmp_path / "t.svg")
    assert "validation top-1" in (tmp_path / "t.svg").read_text()
