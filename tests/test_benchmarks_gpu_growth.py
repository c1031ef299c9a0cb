"""The GPU's tables and the study of growth do what they say, at sizes that take no time."""

from __future__ import annotations

import json

import pytest
from benchmarks import growth


def planted(power, sizes):
    return [growth.Point(size, [2e-6 * size**power, 1e-6 * size**power], 0.0) for size in sizes]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert growth.exponent(planted(power, (10, 40, 160, 640))) == pytest.approx(power)


def test_the_exponent_is_that_of_the_upper_half():
    flat = [growth.Point(size, [1.0], 0.0) for size in (1, 10, 100)]
    assert growth.exponent(flat + planted(2.0, (100, 1000, 10_000))) == pytest.approx(2.0)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(growth, "SIZES", dict.fromkeys(growth.SIZES, (128, 256)))
    monkeypatch.setattr(growth, "fresh", growth.measure)  # without a process for each point
    for name in ("ENTRIES", "CLASSES", "TOPK"):  # which a point sets
        monkeypatch.setattr(growth.bank, name, getattr(growth.bank, name))


def run(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["growth", "--threads", "1", *map(str, given)])
    return growth.main()


def test_every_study_is_shown_and_saved(small, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--json", tmp_path / "g.json") == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["machine"]["threads"] == 1
    assert {study["axis"] for study in content["studies"]} == set(growth.SIZES)
    for study in content["studies"]:
        assert study["name"] in shown
        assert isinstance(study["exponent"], float)
        assert [point["size"] for point in study["points"]] == [128, 256]
        for point in study["points"]:
            assert 0 < point["minimum"] <= point["median"]
            assert point["extra_mib"] >= 0
            assert growth.LEAST <= point["n"] <= growth.MOST


def test_a_point_is_measured_in_a_fresh_process():
    """Whose peak is not that of the process that asks."""
    kept = bytearray(1 << 20)
    point = growth.fresh("listing", 100, 1)
    assert point.size == 100
    assert len(kept) > 0
    assert len(point.seconds) == growth.MOST


STUDIES = [
    {
        "name": name,
        "axis": axis,
        "exponent": 1.0,
        "points": [{"size": 10, "minimum": 0.1}, {"size": 100, "minimum": 1.0}],
    }
    for name, axis in (
        ("one", "anchors"),
        ("two", "anchors"),
        ("three", "classes"),
        ("four", "images"),
    )
]


def test_the_numbers_are_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    numbers, picture = tmp_path / "g.json", tmp_path / "g.svg"
    numbers.write_text(json.dumps({"studies": STUDIES}))
    assert run(monkeypatch, "--json", numbers, "--plot", picture, "--drawn-again") == 0
    text = picture.read_text()
    assert "two: size^1.00" in text
    assert len(text) < 200_000


def test_without_matplotlib_no_plot_is_begun(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--json", tmp_path / "g.json", "--plot", tmp_path / "g.svg")
    assert stopped.value.code == 2
    assert "needs matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
