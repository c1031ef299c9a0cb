"""The tables for a GPU and the growth study, at tiny sizes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from benchmarks import bank, gpu, growth, pairwise, training_steps

from nearkin import functional
from nearkin.distributed import Runtime
from nearkin.functional import _pairs as pairs


def planted(power, sizes):
    return [growth.Point(size, [2e-6 * size**power, 1e-6 * size**power], 0.0) for size in sizes]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    assert growth.exponent(planted(power, (10, 40, 160, 640))) == pytest.approx(power)


def test_the_exponent_is_that_of_the_upper_half():
    flat = [growth.Point(size, [1.0], 0.0) for size in (1, 10, 100)]
    assert growth.exponent(flat + planted(2.0, (100, 1000, 10_000))) == pytest.approx(2.0)


@pytest.fixture
def sizes_kept(monkeypatch):
    """Restore the sizes of the bank's module, which both commands set."""
    for name in ("ENTRIES", "CLASSES", "TOPK"):
        monkeypatch.setattr(bank, name, getattr(bank, name))


@pytest.fixture
def small(sizes_kept, monkeypatch):
    monkeypatch.setattr(growth, "SIZES", dict.fromkeys(growth.SIZES, (128, 256)))
    monkeypatch.setattr(growth, "fresh", growth.measure)  # in this process


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


@pytest.mark.parametrize(("after", "extra"), [(5120, 4.0), (1016, 0.0)])
def test_extra_memory_is_what_the_peak_rose_by(monkeypatch, after, extra):
    """A peak below the earlier reading (the kernel counts in batches of pages) counts as 0."""
    peaks = iter([1024, after])
    monkeypatch.setattr(growth, "_peak", lambda: next(peaks))
    assert growth.measure("listing", 100, torch.get_num_threads()).extra == extra


def test_a_point_is_measured_in_a_fresh_process():
    """The child process measures its own peak."""
    kept = torch.ones(64 << 20)  # 256 MiB of this process
    point = growth.fresh("listing", 100, 1)
    assert point.size == 100
    assert point.extra < kept.nbytes / 2**20 / 4


STUDIES = [
    {
        "name": name,
        "axis": axis,
        "exponent": 1.0,
        "points": [
            {"size": 10, "minimum": 0.1, "extra_mib": 0.0},  # 0 has no logarithm
            {"size": 100, "minimum": 1.0, "extra_mib": 3.5},
        ],
    }
    for name, axis in (
        ("one", "anchors"),
        ("two", "anchors"),
        ("three", "classes"),
        ("four", "images"),
    )
]


def test_the_numbers_are_drawn(monkeypatch, tmp_path):
    numbers, picture = tmp_path / "g.json", tmp_path / "g.svg"
    numbers.write_text(json.dumps({"studies": STUDIES}))
    assert run(monkeypatch, "--json", numbers, "--plot", picture, "--drawn-again") == 0
    text = picture.read_text()
    assert "two: size^1.00" in text
    assert "MiB beyond the inputs" in text
    assert len(text) < 200_000


def test_without_matplotlib_no_plot_is_begun(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--json", tmp_path / "g.json", "--plot", tmp_path / "g.svg")
    assert stopped.value.code == 2
    assert "needs matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--json", "nowhere/g.json"], "the folder nowhere does not exist"),
        (["--json", "g.json", "--drawn-again"], "there is no g.json"),
    ],
)
def test_what_cannot_end_well_is_not_begun(monkeypatch, capsys, tmp_path, given, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *given)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def on_gpu(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["gpu", *map(str, given)])
    return gpu.main()


def test_every_step_and_loss_is_measured(sizes_kept, monkeypatch, capsys, tmp_path):
    path = tmp_path / "gpu.json"
    assert on_gpu(monkeypatch, "--json", path, "--device", "cpu", "--tiny") == 0
    shown = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["device"] == "CPU"
    assert content["machine"]["torch"] == torch.__version__
    assert content["settings"]["batch"] == gpu.TINY.batch
    cases = {(step["model"], step["objective"], step["compiled"]) for step in content["steps"]}
    models = [model for model, _ in gpu.TINY.models]
    assert cases == set(itertools.product(models, gpu.OBJECTIVES, (False, True)))
    for step in content["steps"]:
        assert 0 < step["minimum"] <= step["median"], step
        assert step["n"] == gpu.TINY.runs
        assert step["views"] == (2 if step["objective"] in ("supcon", "schane") else 1)
        assert ("pays_after_steps" in step) == step["compiled"]
        assert step["objective"] in shown
    losses = {loss["loss"]: loss for loss in content["losses"]}
    peer = losses.pop("SupCon of pytorch-metric-learning")
    assert "not installed" in peer.get("failed", "not installed")
    assert {*gpu.LOSSES, "CoNe's bank, bf16", "CoNe's bank, published structure"} <= set(losses)
    assert all(loss["minimum"] > 0 for loss in losses.values())


def test_compiling_is_in_place_and_reaches_the_teacher(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    runtime = Runtime(device="cpu", precision="fp32")
    case = gpu.Case("test_vit", 32, 4, 10, "cone", 64, "eager")
    stepper = training_steps._stepper(case, training_steps._config(case, runtime), runtime)
    names = set(stepper.network.state_dict())
    training_steps.compile_backbones(stepper, "eager")
    assert compiled == [stepper.network.backbone, stepper.teacher.network.backbone]
    assert set(stepper.network.state_dict()) == names
    runtime.close()


def test_the_bank_is_full_and_used():
    """The timed step of CoNe must include its neighbour terms."""
    runtime = Runtime(device="cpu", precision="fp32")
    case = gpu.Case("test_vit", 32, 4, 10, "cone", 64, None)
    step, views = training_steps.prepared(case, runtime)
    assert views == 1
    assert {"ce", "neighbour", "consistency"} == set(step().terms)
    assert all(term > 0 for term in step().terms.values())
    runtime.close()


def test_a_case_that_fails_is_text_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def work(case, *_):
        if case.objective == "supcon":
            raise torch.OutOfMemoryError("no room\nfor this")
        return {"minimum": 0.5 if case.backend else 1.0, "median": 1.0, "start": 2.0} | {
            "peak_mib": 2048.0
        }

    monkeypatch.setattr(gpu, "step_times", work)
    found = gpu.steps(None, gpu.TINY, "m", 32)
    failed = [record for record in found if "failed" in record]
    assert [record["objective"] for record in failed] == ["supcon", "supcon"]
    assert failed[0]["failed"] == "OutOfMemoryError: no room"
    shown = gpu.table("t", "s", found).show()
    assert "supcon, compiled: OutOfMemoryError" in shown
    assert "ce, 2.00 GiB" in shown


@pytest.mark.parametrize(
    ("eager", "compiled", "steps"),
    [
        ({"minimum": 0.3, "start": 1.0}, {"minimum": 0.2, "start": 51.0}, 500),
        ({"minimum": 0.2, "start": 1.0}, {"minimum": 0.2, "start": 51.0}, None),
        ({"failed": "why"}, {"minimum": 0.2, "start": 51.0}, None),
    ],
)
def test_compiling_pays_once_its_seconds_are_saved(eager, compiled, steps):
    assert gpu.pays_after(eager, compiled) == (steps and pytest.approx(steps))


def test_compiled_steps_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(
        gpu, "step_times", lambda case, *_: {"minimum": 1.0, "median": 1.0, "peak_mib": 1.0}
    )
    found = gpu.steps(None, replace(gpu.TINY, backend=None), "m", 32)
    assert [(each["objective"], each["compiled"]) for each in found] == [
        (objective, False) for objective in gpu.OBJECTIVES
    ]


def test_the_matrices_are_whole_on_any_device():
    """The peer of the losses must not be the tiles again, on a GPU either."""
    features, labels = pairwise.batch(pairs.LARGE_ON_GPU)
    before, seen = (pairs.LARGE, pairs.LARGE_ON_GPU), []

    def loss(z, _):
        seen.append(min(pairs.LARGE, pairs.LARGE_ON_GPU))
        return functional.PerAnchor(z[:, 0], torch.ones(len(z), dtype=torch.bool))

    pairwise.plain(loss, features, labels)
    assert seen == [len(features) + 1]
    assert before == (pairs.LARGE, pairs.LARGE_ON_GPU)


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu(monkeypatch, "--json", tmp_path / "gpu.json") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
