"""The benchmarks of start-up and evaluation."""

from __future__ import annotations

import subprocess

import pytest
import timm
from benchmarks import bench, evaluation, first_step, startup

import nearkin
from nearkin.evaluation.model import read_description
from nearkin.training.run_folder import stored_settings
from nearkin.training.step import Stepper


class Left(BaseException):
    """Raised instead of ending this process."""


@pytest.fixture
def leaving(monkeypatch):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(first_step.os, "_exit", leave)
    monkeypatch.setattr(Stepper, "step", Stepper.step)  # restored afterwards


def test_both_ways_take_one_step_of_the_same_model(leaving, monkeypatch, tmp_path):
    learners = []
    step = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda self, *x: (learners.append(self), step(self, *x))[1]
    )
    with pytest.raises(Left, match="^0$"):
        first_step.train(str(tmp_path / "run"))
    assert [stepper.steps_done for stepper in learners] == [1]
    config = stored_settings(tmp_path / "run")
    chosen = config.model, config.channels, config.batch_size, config.lr
    assert chosen == (
        first_step.MODEL,
        first_step.CHANNELS,
        first_step.BATCH,
        pytest.approx(first_step.LR),
    )
    assert (config.optimizer, config.momentum, config.nesterov) == ("sgd", 0.9, True)
    theirs = first_step.small_model(timm)
    theirs.reset_classifier(0)
    ours = learners[0].network.backbone
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]
    strides = [[m.stride for m in n.modules() if hasattr(m, "stride")] for n in (theirs, ours)]
    assert strides[0] == strides[1]


def test_the_plain_way_takes_its_step(leaving):
    with pytest.raises(Left, match="^0$"):
        first_step.plain_train()


def test_the_plain_prediction_reads_what_nearkin_wrote(leaving, tmp_path):
    first_step.prepare(str(tmp_path))
    run, image = tmp_path / "run", tmp_path / "image.png"
    assert len(list(nearkin.predict(run, [image]))) == 1
    with pytest.raises(Left, match="^0$"):
        first_step.plain_predict(str(run), str(image))


def test_processor_time_of_children_is_counted():
    before = startup.processor_seconds()
    startup.process("benchmarks.bench", code=0)
    assert startup.processor_seconds() > before


def test_a_mistake_must_end_with_its_exit_code():
    for words, code in startup.MISTAKES.values():
        startup.process("nearkin", *words, code=code)


def test_a_process_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        startup.process("nearkin", "no-such-verb")


def test_each_first_step_has_a_run_folder_of_its_own(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(startup, "process", lambda *words: given.append(words))
    call = startup._first_step(tmp_path)
    call()
    call()
    assert given[0][:2] == ("benchmarks.first_step", "train")
    assert given[0][2] != given[1][2]


def test_time_inside_a_watched_function_is_counted_and_the_function_put_back():
    class Owner:
        def work(self):
            return 3

    inner, spent = Owner.work, {}
    with evaluation.watched(Owner, "work", spent):
        assert Owner().work() == 3
    assert Owner.work is inner
    assert spent["work"] > 0


@pytest.fixture
def small_evaluation(monkeypatch):
    small = {"RUNS": 1, "MODEL": "resnet10t", "SIDE": 16, "PIXELS": (32, 24), "IMAGES": 4}
    for name, value in small.items():
        monkeypatch.setattr(evaluation, name, value)


def test_the_second_ensemble_reads_what_the_first_left(small_evaluation, monkeypatch, tmp_path):
    cached = []
    evaluate = evaluation.evaluate

    def watched(*given, **options):
        result = evaluate(*given, **options)
        cached.append(all(member.cached for member in result.members))
        return result

    monkeypatch.setattr(evaluation, "evaluate", watched)
    evaluation.evaluation(tmp_path)
    assert cached == [False, False, False, True] * 2


def test_the_shares_are_of_one_run(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "RUN", {"objective": "ce", "epochs": 1})
    rows = evaluation.shares(tmp_path / "run")
    assert read_description(tmp_path / "run").metrics["split"] == "test"
    validation, checkpoints, both, *others = (row.ratio for row in rows if row.unit == "%")
    assert both == pytest.approx(validation + checkpoints)
    assert all(0 < part < 100 for part in (validation, checkpoints, *others))
    assert both + sum(others) < 100
    assert [row.what for row in rows if row.target is not None] == [
        "its validation and checkpoints"
    ]


def test_seconds_are_minima_beside_medians():
    row = bench.fastest({"a": [3.0, 1.0, 2.0]}, "a", "x", 0.5)
    assert (row.ratio, row.median, row.unit, row.missed) == (1.0, 2.0, "s", True)
