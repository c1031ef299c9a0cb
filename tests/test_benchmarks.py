"""The benchmarks measure what their rows claim, at tiny sizes; a missed target gives exit code 1."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import (
    bank,
    bench,
    data,
    doctor,
    evaluation,
    look,
    pairwise,
    predict,
    startup,
    step,
)

from nearkin.data.dataset import load_dataset
from nearkin.data.loader import eval_loader
from nearkin.data.transforms import EvalSpec
from nearkin.evaluation.tta import tta_views


def test_a_target_is_missed_on_its_own_side():
    assert bench.Row("less is good", 1.3, target=1.2).missed
    assert not bench.Row("less is good", 1.1, target=1.2).missed
    assert bench.Row("more is good", 4.0, target=5, higher=True).missed
    assert not bench.Row("more is good", 6.0, target=5, higher=True).missed
    assert not bench.Row("no target", 100.0).missed


def test_ratios_are_of_minima():
    seconds = {"ours": [2.0, 3.0, 9.0], "unit": [4.0, 1.0, 5.0]}
    row = bench.ratio(seconds, "ours", "unit", "x")
    assert (row.ratio, row.median) == (2.0, 0.75)
    assert (row.ours, row.peer, row.runs) == (2.0, 1.0, 3)
    assert bench.ratio(seconds, "ours", "unit", "x", higher=True).ratio == 0.5


def test_a_table_shows_both_sides_the_limit_and_the_target():
    seconds = {"ours": [2.0, 3.0], "peer": [0.5, 0.75]}
    rows = [bench.ratio(seconds, "ours", "peer", "this", 1.2, limit=0.9), bench.Row("that", 1.0)]
    titles, first, second = bench.Table("T", "S", rows).show().splitlines()[-3:]
    assert titles.split() == ["ours", "peer", "ratio", "medians", "limit", "target", "n"]
    shown = ["this", "2.00", "s", "500.0", "ms", "4.00", "x", "4.00", "0.9", "<=", "1.2", "2"]
    assert first.split() == [*shown, "MISSED"]
    assert second.split() == ["that", "1.00"]


def test_calls_alternate_after_a_round_that_does_not_count():
    order = []
    seconds = bench.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    ("least", "rounds"),
    [([5, 1, 1.02, 1.01], 4), ([1, 5, 5, 5, 5, 1.02, 1.01], 7), ([1, *[5] * 99], 12)],
)
def test_more_rounds_until_the_least_is_no_accident(least, rounds):
    """At least four, at most three times as many."""
    now, durations = [0.0], iter([9, *least])

    def call():
        now[0] += next(durations)

    assert len(bench.alternate({"it": call}, 4, 3, lambda: now[0])["it"]) == rounds


@pytest.fixture
def small(monkeypatch):
    sizes = {
        pairwise: {"SAMPLES": 64},
        bank: {"ENTRIES": 4096, "CLASSES": 10, "DIM": 8, "TOPK": 16},
        data: {"IMAGES": 4, "BATCH": 2, "SMALL": (("test_resnet", 8, 8.0),)},
        step: {"BATCH": 8, "CLASSES": 4, "BANK": 64, "ROUNDS": 2, "SECONDS": 0.01}
        | {"LARGE": (("test_resnet", 16),), "SMALL": (("test_resnet", 16, 0.5),)},
        look: {"FILES": 20, "LARGE": 2, "LISTED": 100, "RUNS": 1},
        evaluation: {"IMAGES": 8},
        doctor: {"FILES": 20, "RUNS": 1},
        predict: {"RUNS": 1}
        | {"OPTIONS": {"model": "test_resnet", "image_size": 16, "batch_size": 8}},
    }
    for module, values in sizes.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    # What these do is tested in test_benchmarks_startup.py.
    monkeypatch.setattr(startup, "process", lambda *words, code=0: None)
    monkeypatch.setattr(startup, "processor_seconds", time.perf_counter)
    for part in ("evaluation", "shares"):
        monkeypatch.setattr(evaluation, part, lambda place: [bench.Row(str(place), 1.0)])
    for module in (pairwise, bank):
        monkeypatch.setattr(
            module,
            "extra_memory",
            lambda _m, _n, what, target=None, limit=None: bench.Row(what, 1.0, None, target),
        )


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm's loader leaves files open
def test_every_table_is_shown_and_saved(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.Row, "missed", property(lambda row: False))
    monkeypatch.setattr(
        "sys.argv", ["benchmarks", "--threads", "1", "--json", str(tmp_path / "b.json")]
    )
    assert command.main() == 0
    shown = capsys.readouterr().out
    assert "SupCon (out)" in shown
    assert "published structure" in shown
    assert "train, cached" in shown
    assert "cone against ce" in shown
    assert "predict from files, images/s" in shown
    tables = json.loads((tmp_path / "b.json").read_text())["tables"]
    ratios = [row["ratio"] for table in tables for row in table["rows"]]
    assert len(ratios) > 20
    assert all(math.isnan(r) or r >= 0 for r in ratios)


def test_a_target_that_is_missed_is_named_and_is_a_failure(monkeypatch, capsys):
    rows = [bench.Row("slow", 2.0, None, 1.5), bench.Row("quick", 1.0, None, 1.5)]
    monkeypatch.setattr(bank, "table", lambda: bench.Table("Bank", "planted", rows))
    monkeypatch.setattr("sys.argv", ["benchmarks", "bank"])
    assert command.main() == 1
    assert capsys.readouterr().out.rstrip().endswith("missed: slow")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["step", "speed"], "no table speed; there are pairwise,"),
        (["--json", "nowhere/b.json"], "the folder nowhere does not exist"),
    ],
)
def test_what_cannot_end_well_is_not_begun(monkeypatch, capsys, tmp_path, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks", *given])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_published_structure_computes_what_we_compute(small):
    """Both totals agree for the same bank and batch, so the comparison is fair."""
    x, theirs, ours = bank.given(), bank.published(), bank.filled(torch.float32)
    kept = []
    original = torch.autograd.backward
    try:
        torch.autograd.backward = lambda total: (
            kept.append(float(total.detach())) or original(total)
        )
        theirs.step(x)
        bank.ours(ours, x)
    finally:
        torch.autograd.backward = original
    assert kept[0] == pytest.approx(kept[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:unclosed file")  # timm's loader leaves files open
def test_both_loaders_give_the_same_pixels_to_the_network(small, tmp_path):
    """Evaluation is not random: batches of timm's loader and ours agree up to the rounding of resizing."""
    root = data.pictures(tmp_path)
    split = load_dataset(str(root), val_split=0).splits["train"]
    views = tta_views("none", EvalSpec.for_size(data.SIDE, 3, data.SIDE / data.CACHED_SIDE))
    (ours, *_) = eval_loader(split, views, range(4), batch_size=4, workers=0)
    mine = data.normalising()(ours.images[0]).features
    theirs = torch.cat([images for images, _ in data.timms(root, train=False).args[0]])
    order = [str(path) for path in sorted(root.rglob("*.jpg"))]
    assert [split.images.path(row) for row in range(4)] == order
    difference = (mine - theirs).abs()
    assert difference.mean() < 0.01
    assert difference.max() < 0.1
