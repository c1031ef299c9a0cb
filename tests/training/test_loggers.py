"""`--log`: TensorBoard's files as TensorBoard reads them; W&B and MLflow by stubs that record the calls."""

from __future__ import annotations

import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from tests.processes import finish, ranks, start
from tests.training.test_resume import killed_at

import nearkin
from nearkin.cli import run as command
from nearkin.config import RunConfig, validate
from nearkin.errors import ConfigError
from nearkin.training import loggers
from nearkin.training.loggers import Loggers, Point, check_installed, point
from nearkin.training.metrics_log import read_metrics

TINY = {
    **{"data": "digits", "objective": "supcon", "model": "test_resnet", "images_per_class": 16},
    **{"epochs": 2, "batch_size": 32, "threads": 1, "workers": 0, "log_every": 2},
}


def record(step, kind="train", **values):
    clock = {"time": f"2026-01-01T00:00:{step:02}.500+00:00", "seconds": 1.0}
    return {"kind": kind, "stage": "joint", "step": step, "epoch": 0, **values, "clock": clock}


def in_tensorboard(folder):
    """{tag: [(step, value)]}, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def in_journal(run):
    """The same from metrics.jsonl, with rules of its own."""
    found = {}
    for line in read_metrics(run / "metrics.jsonl"):
        for name, value in line.items():
            if type(value) in (int, float) and name not in ("step", "epoch"):
                found.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    return found


class Told:
    """What a person reads."""

    def __init__(self):
        self.said, self.warned, self.threads = [], [], set()

    def say(self, text):
        self.said.append(text)
        self.threads.add(threading.current_thread())

    def warn(self, text):
        self.warned.append(text)
        self.threads.add(threading.current_thread())


def sent(log, folder, records, past=(), metrics=None, told=None):
    told = told or Told()
    some = Loggers(log, told.say, told.warn)
    some.start({"lr": 0.1, "objective.topk": 3}, folder, list(past))
    for each in records:
        some.record(each)
    some.close(metrics)
    assert told.threads <= {threading.current_thread()}
    return told


def test_a_run_is_in_tensorboard_as_in_its_journal(tmp_path):
    result = nearkin.train(log="tensorboard", out=tmp_path / "run", **TINY)
    shown, journal = in_tensorboard(result.run), in_journal(result.run)
    final = {tag: shown.pop(tag) for tag in list(shown) if tag.startswith("final/")}
    assert shown == journal
    assert final["final/top1"] == [(journal["train/loss"][-1][0], result.test_top1)]
    assert {"train/supcon", "epoch/without_positive", "validation/top1"} <= set(shown)
    (file,) = (result.run / "tensorboard").iterdir()
    assert file.name == "events.out.tfevents.nearkin", "no name of a host"


def test_an_event_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "theirs").write_bytes(b"theirs")
    file = tmp_path / "run" / "tensorboard" / "events.out.tfevents.nearkin"
    file.symlink_to(tmp_path / "theirs")
    sent("tensorboard", tmp_path / "run", [record(1, loss=1.0)])
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert file.is_file()
    assert not file.is_symlink()


def test_no_event_file_is_made_in_what_a_link_names(tmp_path):
    for name in ("run", "theirs"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "theirs")
    told = sent("tensorboard", tmp_path / "run", [record(1, loss=1.0)])
    assert list((tmp_path / "theirs").iterdir()) == []
    assert "the folder is a link" in told.warned[0]


def test_a_run_that_goes_on_has_the_log_of_one_that_never_stopped(tmp_path):
    records = [record(step, loss=1 / step, ce=step / 3) for step in range(1, 30)]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    sent("tensorboard", tmp_path / "whole", records)
    sent("tensorboard", tmp_path / "parts", records[:20])  # killed after a checkpoint at step 12
    sent("tensorboard", tmp_path / "parts", records[12:], past=records[:12])
    whole, parts = (
        (tmp_path / name / "tensorboard" / "events.out.tfevents.nearkin").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert [step for step, _ in in_tensorboard(tmp_path / "parts")["train/ce"]] == [*range(1, 30)]


def test_tensorboard_has_the_settings_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = sent("tensorboard", tmp_path, [record(1, loss=1.0)])
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    (event,) = read.Tensors("settings")
    assert event.tensor_proto.string_val[0].decode().split() == [
        "lr:",
        "0.1",
        "objective.topk:",
        "3",
    ]
    assert told.said == [f"log: tensorboard --logdir {tmp_path}/tensorboard"]


def test_a_point_has_the_finite_numbers_of_a_record():
    values = {"loss": 0.5, "n": 3, "best": True, "name": "x", "list": [1], "nan": float("nan")}
    found = point(record(7, **values, inf="inf", worse=float("inf")))
    assert found == Point(7, 1767225607.5, {"train/loss": 0.5, "train/n": 3.0})


class Stub(types.ModuleType):
    """A package that records its calls as (name, positional, keywords). fails: names of calls that raise."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.calls, self.fails = [], set(fails)
        self.__spec__ = ModuleSpec(name, None)

    def call(self, name, /, *positional, **keywords):
        self.calls.append((name, positional, keywords))
        if name in self.fails:
            raise ConnectionError("no route\nto host")

    def named(self, name):
        return [(p, k) for called, p, k in self.calls if called == name]


def wandb_stub(monkeypatch, step=0, fails=()):
    stub = Stub("wandb", fails)

    class Run:
        url, offline = "https://wandb.example/run", False

        def __init__(self):
            self.step, self.summary = step, self

        def update(self, values):
            stub.call("summary", values)

        def log(self, values, step):
            stub.call("log", values, step=step)

        def finish(self, exit_code):
            stub.call("finish", exit_code=exit_code)

    def init(**keywords):
        stub.call("init", **keywords)
        return Run()

    stub.init, stub.Settings = init, lambda **given: given
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_gets_the_records_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    stub = wandb_stub(monkeypatch)
    records = [record(step, loss=1.0 * step) for step in (1, 2, 3, 4)]
    told = sent("wandb", tmp_path, records[:3], metrics={"top1": 0.5, "split": "test", "n": 3})
    assert [k["step"] for _, k in stub.named("log")] == [1, 2, 3]
    assert stub.named("log")[1] == (({"train/loss": 2.0},), {"step": 2})
    assert stub.named("summary") == [(({"final/top1": 0.5},), {})]
    assert stub.named("finish") == [((), {"exit_code": 0})]
    assert told.said == ["log: https://wandb.example/run"]
    ((_, first),) = stub.named("init")
    assert first["config"] == {"lr": 0.1, "objective.topk": 3}
    assert first["resume"] == "allow"

    again = wandb_stub(monkeypatch, step=4)  # W&B has up to step 3, the checkpoint is of step 2
    sent("wandb", tmp_path, records[2:], past=records[:2])
    assert [k["step"] for _, k in again.named("log")] == [4]
    assert again.named("init")[0][1]["id"] == first["id"] == (tmp_path / "wandb.id").read_text()
    assert again.named("finish") == [((), {"exit_code": 1})]


def mlflow_stub(monkeypatch, history=None, fails=()):
    """history: of each metric, the steps that the server has."""
    stub = Stub("mlflow", fails)
    entities = types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, timestamp, step)
    entities.Param = lambda key, value: (key, value)

    class Client:
        def get_experiment_by_name(self, name):
            stub.call("get_experiment_by_name", name)

        def create_experiment(self, name):
            stub.call("create_experiment", name)
            return "7"

        def create_run(self, experiment, run_name):
            stub.call("create_run", experiment, run_name)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        def get_metric_history(self, run, name):
            steps = (history or {}).get(name, [])
            return [types.SimpleNamespace(step=step) for step in steps]

        def __getattr__(self, name):
            return lambda *positional, **keywords: stub.call(name, *positional, **keywords)

    stub.MlflowClient, stub.entities = Client, entities
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return stub


def metrics_of(stub):
    return [metric for _, k in stub.named("log_batch") for metric in k.get("metrics", ())]


def test_mlflow_gets_the_records_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    stub = mlflow_stub(monkeypatch)
    records = [record(step, loss=1.0 * step) for step in (1, 2, 3, 4)]
    sent("mlflow", tmp_path, records[:3], metrics={"top1": 0.5})
    assert stub.named("create_experiment") == [(("nearkin",), {})]
    assert stub.named("create_run") == [(("7", tmp_path.name), {})]
    assert stub.named("log_batch")[0] == (
        ("abc",),
        {"params": [("lr", "0.1"), ("objective.topk", "3")]},
    )
    milliseconds = 1767225600500
    assert metrics_of(stub) == [
        *[("train/loss", 1.0 * s, milliseconds + 1000 * s, s) for s in (1, 2, 3)],
        ("final/top1", 0.5, milliseconds + 3000, 3),
    ]
    assert stub.named("set_terminated") == [(("abc", "FINISHED"), {})]

    again = mlflow_stub(monkeypatch, history={"train/loss": [1, 2, 3]})
    sent("mlflow", tmp_path, records[2:], past=records[:2])
    assert again.named("create_run") == []
    assert again.named("update_run") == [(("abc",), {"status": "RUNNING"})]
    assert [step for *_, step in metrics_of(again)] == [4]
    assert again.named("set_terminated") == [(("abc", "KILLED"), {})]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_logger_that_fails_gives_one_warning(tmp_path, monkeypatch, call):
    stub = wandb_stub(monkeypatch, fails={call})
    told = sent("wandb", tmp_path, [record(step, loss=1.0) for step in range(9)])
    assert told.warned == [
        "--log wandb failed and is left out (ConnectionError: no route); metrics.jsonl has all records."
    ]
    assert len(stub.named(call)) == (2 if call == "finish" else 1)
    assert stub.named("log") == [] or call != "init"


@pytest.mark.parametrize("written", [0, 1, 5])
def test_a_full_disk_costs_a_warning_and_the_next_process_mends_the_file(
    tmp_path, monkeypatch, written
):
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = [record(step, loss=1 / step) for step in range(1, 12)]
    left, write = [written], RecordWriter.write

    def until_full(self, data):
        left[0] -= 1
        if left[0] < 0:
            self._writer.write(data[:3])  # a part of it
            raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as full:
        full.setattr(RecordWriter, "write", until_full)
        told = sent("tensorboard", tmp_path, records)
    assert len(told.warned) == 1
    assert "No space left on device" in told.warned[0]
    sent("tensorboard", tmp_path, records[5:], past=records[:5])
    assert [step for step, _ in in_tensorboard(tmp_path)["train/loss"]] == [*range(1, 12)]


def test_a_journal_that_was_edited_costs_a_warning(tmp_path):
    told = sent("tensorboard", tmp_path, [record(3, loss=1.0)], past=[{"step": 1, "kind": "train"}])
    assert len(told.warned) == 1
    assert "KeyError" in told.warned[0]


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on_has_one_log(tmp_path):
    words = [
        *["train", "digits", "--objective", "ce", "--epochs", "3", "--model", "test_resnet"],
        *["--images-per-class", "40", "--threads", "1", "--log-every", "2", "--quiet"],
        *["--batch-size", "32", "--save-minutes", "0.0001", "--log", "tensorboard"],
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finish(start(command, [*words, "--out", str(whole)], log=tmp_path / "log")) == [0]
    resume = [*words, "--out", str(parts)]
    for step in (8, 20):
        assert killed_at(start(command, resume, log=tmp_path / "log"), parts, step)
        resume = ["train", "--resume", str(parts), "--quiet"]
    assert finish(start(command, resume, log=tmp_path / "log")) == [0]
    assert in_tensorboard(parts).keys() == in_tensorboard(whole).keys()
    for tag, values in in_tensorboard(whole).items():
        assert in_tensorboard(parts)[tag] == [(s, v.expected) for s, v in values], tag


@pytest.mark.slow
def test_of_two_processes_the_first_logs(tmp_path):
    words = ["train", "digits", "--objective", "supcon", "--epochs", "1", "--model", "test_resnet"]
    words += ["--images-per-class", "20", "--threads", "1", "--log", "tensorboard", "--quiet"]
    words += ["--out", str(tmp_path / "run")]
    started = [start(command, words, env=env, log=tmp_path / "log") for env in ranks(2)]
    assert finish(*started) == [0, 0], (tmp_path / "log").read_text()
    shown = in_tensorboard(tmp_path / "run")
    assert {tag: v for tag, v in shown.items() if not tag.startswith("final/")} == in_journal(
        tmp_path / "run"
    )
    assert len(list((tmp_path / "run" / "plots").iterdir())) == 2


def test_a_package_that_cannot_be_imported_gives_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = sent("wandb", tmp_path, [record(1, loss=1.0)])
    (text,) = told.warned
    assert "ModuleNotFoundError" in text


def test_the_other_loggers_go_on(tmp_path, monkeypatch):
    wandb_stub(monkeypatch, fails={"init"})
    told = sent("wandb,tensorboard", tmp_path, [record(step, loss=1.0) for step in (1, 2)])
    assert len(told.warned) == 1
    assert in_tensorboard(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0)]


def test_a_logger_that_hangs_is_left_behind(tmp_path, monkeypatch):
    stub, never = wandb_stub(monkeypatch), threading.Event()
    stub.init = lambda **_: never.wait()
    monkeypatch.setattr(loggers, "PATIENCE", 0.1)
    monkeypatch.setattr(loggers, "LONGEST_QUEUE", 5)
    told = sent("wandb", tmp_path, [record(step, loss=1.0) for step in range(9)])
    never.set()
    assert told.warned == [
        "--log wandb failed and is left out (5 records wait for it); metrics.jsonl has all records."
    ]


def test_a_logger_that_was_too_slow_is_closed_as_failed(tmp_path, monkeypatch):
    stub, slow = wandb_stub(monkeypatch), threading.Event()
    made = stub.init
    stub.init = lambda **given: (slow.wait(), made(**given))[1]
    monkeypatch.setattr(loggers, "LONGEST_QUEUE", 5)
    threading.Timer(0.5, slow.set).start()
    told = sent("wandb", tmp_path, [record(step, loss=1.0) for step in range(9)])
    assert "5 records wait for it" in told.warned[0]
    assert stub.named("finish") == [((), {"exit_code": 1})]
    assert stub.named("log") == []


def test_settings_that_are_not_utf_8_go_to_tensorboard(tmp_path):
    told = Told()
    some = Loggers("tensorboard", told.say, told.warn)
    some.start({"data": "/photos/caf\udce9\nx"}, tmp_path, [])
    some.close()
    assert told.warned == []


def test_a_run_survives_its_loggers(tmp_path, monkeypatch):
    """The disk refuses TensorBoard's file, W&B has no network, and the weights are those of a run without both."""
    wandb_stub(monkeypatch, fails={"log"})
    plain = nearkin.train(out=tmp_path / "plain", **TINY)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "open", refusing(Path.open, "tfevents"))
    found = nearkin.train(out=tmp_path / "run" / "x", log="tensorboard,wandb", **TINY)
    assert found.metrics == plain.metrics
    weights = [(run / "model.safetensors").read_bytes() for run in (plain.run, found.run)]
    assert weights[0] == weights[1]
    warnings = [t for t in (found.run / "train.log").read_text().splitlines() if "warning" in t]
    assert sorted(text.split("--log ")[1].split()[0] for text in warnings) == [
        "tensorboard",
        "wandb",
    ]
    assert "No space left" in "".join(warnings)


def refusing(opened, part):
    def refuse(path, *positional, **keywords):
        if part in path.name:
            raise OSError(28, "No space left on device")
        return opened(path, *positional, **keywords)

    return refuse


def test_log_may_change_when_a_run_goes_on(tmp_path):
    options = TINY | {"save_minutes": 0.0001}
    result = nearkin.train(out=tmp_path / "run", **options)
    whole, last = in_journal(result.run), max((result.run / "checkpoints").glob("step-*"))
    for path in [last, *(result.run / name for name in ("model.json", "status.json"))]:
        remove(path)
    again = nearkin.train(resume=result.run, log="tensorboard")
    assert again.metrics == result.metrics
    shown = in_tensorboard(result.run)
    assert {tag: v for tag, v in shown.items() if not tag.startswith("final/")} == whole


def remove(path):
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("wandb", "wandb"),
        (" mlflow, wandb,mlflow ", "mlflow,wandb"),
        ("none", None),
        ("", None),
        (None, None),
    ],
)
def test_names_are_kept_once_each(given, kept):
    assert validate(RunConfig, {"log": given}).log == kept


@pytest.mark.parametrize("given", ["tensorbord", "wandb,", "wandb\n,x"])
def test_unknown_names_are_refused(given):
    with pytest.raises(ConfigError, match=r"--log .* There are: tensorboard, wandb, mlflow, none"):
        validate(RunConfig, {"log": given})


def test_a_missing_package_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"run: uv sync --extra wandb --extra mlflow; .*/nearkin\[wandb,mlflow\]'"
    ):
        check_installed("wandb,mlflow")
    check_installed(None)


def test_every_name_has_a_logger_and_an_extra():
    from importlib.metadata import metadata

    from nearkin.catalogue import LOGGERS

    assert set(LOGGERS) == set(loggers.LOGGERS)
    assert set(LOGGERS) <= set(metadata("nearkin").get_all("Provides-Extra"))
