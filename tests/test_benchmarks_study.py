"""The study: its pieces and settings can be run today, and its page says what its files say."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.study import ensembles, figures
from benchmarks.study.__main__ import CONTRASTS, RUNS
from benchmarks.study.pieces import PIECES, finished_runs
from benchmarks.study.pilots import CELLS, FEW, FEW_CELL, FEW_SETTINGS, RESULTS, SETTINGS

from nearkin.cli.train import parser
from nearkin.comparison.entries import parse
from nearkin.config import RunConfig, validate
from nearkin.training.prepare import validated_options


def test_the_page_is_drawn_from_the_files(tmp_path, monkeypatch):
    drawn = tmp_path / "study.md"
    page, monkey = figures.PAGE, monkeypatch.setattr
    monkey(figures, "PAGE", drawn)
    figures.draw(RUNS, CONTRASTS)
    assert drawn.read_text() == page.read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert pictures
    for name in pictures:
        assert (tmp_path / name).read_text() == page.with_name(name).read_text()


LONG = "attract-repulse:contrast_share=0.3:teacher_lr=1"


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_the_options_of_a_piece_are_options(piece):
    entries = parse(piece.objectives.split(","))
    for entry in entries:
        own = {"objective": entry.objective} | entry.options
        validated_options(validate(RunConfig, piece.options | own))


@pytest.mark.parametrize("name", [*SETTINGS, *FEW_SETTINGS])
def test_the_options_of_a_setting_are_options(name):
    words = (SETTINGS | FEW_SETTINGS)[name].split()
    if "--change" in words:
        words = words[2:]
    for cell in CELLS.values() if name in SETTINGS else [FEW_CELL]:
        given = parser().read([*cell.options.split(), *words])
        validated_options(validate(RunConfig, given))


def test_every_row_of_the_pilots_has_the_options_of_today():
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        settings = FEW_SETTINGS if row["cell"] == FEW else SETTINGS
        assert row["options"] == settings[row["name"]]


def test_ensembles_are_of_all_seeds_and_computed_once(tmp_path, monkeypatch):
    name, called = "few-cifar", []
    folders = {entry.name: entry.folder for entry in parse(PIECES[name].objectives.split(","))}
    for entry, seed in (("ce", 0), ("ce", 1), (LONG, 0)):
        run = tmp_path / "runs" / name / "runs" / f"{folders[entry]}-seed{seed}"
        run.mkdir(parents=True)
        (run / "model.safetensors").touch()
    (tmp_path / "runs" / name / "runs" / "ce+ema-seed0").mkdir()  # not finished

    def evaluate(runs, tta):
        called.append((tuple(run.name for run in runs), tta))
        return SimpleNamespace(top1=0.5, log_loss=1.0, n=10)

    monkeypatch.setattr(ensembles.nearkin, "evaluate", evaluate)
    monkeypatch.setattr(ensembles, "RESULTS", tmp_path / "rows.csv")
    monkeypatch.setenv("NEARKIN_BENCH_STUDY", str(tmp_path))
    monkeypatch.setattr(ensembles.sys, "argv", ["ensembles"])
    ensembles.main()
    ensembles.main()
    both = ("ce-seed0", "ce-seed1")
    singles = [(each,) for each in ("ce-seed0", "ce-seed1", f"{folders[LONG]}-seed0")]
    assert sorted(called) == sorted(
        (runs, tta) for runs in (*singles, both) for tta in ("none", "tencrop")
    )
    assert [(entry, seed) for entry, seed, _ in finished_runs(tmp_path, name)] == [
        ("ce", 0),
        ("ce", 1),
        (LONG, 0),
    ]
    assert Path(tmp_path / "rows.csv").read_text().count("\n") == 1 + 8
