"""The run journal: what it writes, what a kill leaves, and how it bears a broken disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from nearkin.errors import ModelError
from nearkin.training import metrics_log
from nearkin.training.metrics_log import Journal, read_metrics


def record(journal: Journal, step: int, **values: object) -> None:
    journal.record("train", stage="main", step=step, epoch=step // 10, **values)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_one_line_per_record_and_the_clock_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record(
        "validation", stage="linear", step=7, epoch=2, clock={"seconds": 1.5}, top1=0.1 + 0.2
    )
    record(journal, 8, **{"loss/kin": 0.5, "classes": ("a", "ü\udcff")})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="ascii").splitlines()
    first, second = map(json.loads, lines)
    clock = first.pop("clock")
    assert clock.pop("seconds") == 1.5
    assert datetime.fromisoformat(clock.pop("time")).utcoffset() is not None
    assert clock == {}
    assert first == {
        "kind": "validation",
        "stage": "linear",
        "step": 7,
        "epoch": 2,
        "top1": 0.1 + 0.2,
    }
    assert second["loss/kin"] == 0.5
    assert second["classes"] == ["a", "ü\udcff"]
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_numbers_that_json_cannot_hold_become_texts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    values = [float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")]
    record(journal, 1, values=values, deep={"x": {"y": np.nan}}, count=np.int64(3), path=tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=no_constant)
    assert line["values"] == ["nan", "inf", "-inf", "nan", "inf"]
    assert line["deep"] == {"x": {"y": "nan"}}
    assert line["count"] == 3
    assert line["path"] == str(tmp_path)


def test_equal_runs_are_equal_but_for_the_clock(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        journal = Journal(tmp_path / name)
        for step in range(5):
            journal.record("train", stage="s", step=step, epoch=0, clock={"t": name}, loss=step / 3)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert first != second
    for line in first + second:
        del line["clock"]
    assert first == second


def test_cutting_back_keeps_the_bytes_up_to_the_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (0, 5, 10, 10, 15):
        record(journal, step, loss=0.1 * step)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    journal.cut_back(15)
    assert path.read_bytes() == b"".join(lines)
    journal.cut_back(10)
    assert path.read_bytes() == b"".join(lines[:4])
    journal.cut_back(-1)
    assert path.read_bytes() == b""
    record(journal, 0)
    assert steps(tmp_path) == [0]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_new_fit_of_the_classifier_is_recorded_once(tmp_path: Path) -> None:
    """Its record has the last step, and a run that goes on from there fits again."""
    journal = Journal(tmp_path)
    record(journal, 5)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    journal.record("refit", stage="all", step=5, epoch=0, kept=True)
    journal.cut_back(5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_validation_that_is_made_again_is_recorded_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.record("epoch", stage="classify", step=step, epoch=step)
        journal.record("validation", stage="classify", step=step, epoch=step)
    journal.cut_back(2)
    assert len(journal.records()) == 4
    journal.cut_back(2, validated=False)
    kept = [(record["kind"], record["step"]) for record in journal.records()]
    assert kept == [("epoch", 1), ("validation", 1), ("epoch", 2)]


def test_cutting_back_without_a_file_makes_none(tmp_path: Path) -> None:
    Journal(tmp_path).cut_back(3)
    assert list(tmp_path.iterdir()) == []


def test_a_line_torn_at_any_byte_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record(journal, 1, name="first")
    path = tmp_path / "metrics.jsonl"
    size = path.stat().st_size
    record(journal, 2, name="second")
    whole = path.read_bytes()
    for length in range(size, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert steps(tmp_path) == [1], length
        journal.cut_back(2)
        assert path.read_bytes() == whole[:size]
    path.write_bytes(whole[:-1])  # only the end of the line is missing
    journal.cut_back(2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"kind": 1}', b""])
def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ModelError, match=r"metrics\.jsonl line 2"):
        read_metrics(path)
    with pytest.raises(ModelError, match="line 2"):
        Journal(tmp_path).cut_back(1)


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"metrics\.jsonl cannot be read: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_status_is_replaced_in_one_step(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    path = tmp_path / "status.json"
    journal.status("running", step=1, steps=10, epoch=0)
    with path.open("rb") as reader:  # an earlier reader keeps the old file, whole
        journal.status("done", step=10, steps=10, epoch=1, best=float("nan"), message="saved")
        assert json.load(reader)["state"] == "running"
    status = json.loads(path.read_text(), parse_constant=no_constant)
    assert datetime.fromisoformat(status.pop("updated")).utcoffset() is not None
    assert status == {
        "state": "done",
        "step": 10,
        "steps": 10,
        "epoch": 1,
        "best": "nan",
        "message": "saved",
        "pid": os.getpid(),
    }
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_may_replace_the_status(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def write() -> None:
        for step in range(200):
            journal.status("failed", step=step, steps=200, epoch=0)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not journal.failures


def test_the_heartbeat_is_written_every_ten_seconds_and_never_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: seconds)

    def fsync(_: int) -> None:
        raise AssertionError("a heartbeat must not wait for the disk")

    monkeypatch.setattr(os, "fsync", fsync)
    journal, written = Journal(tmp_path), []
    for step in range(25):
        seconds = 100.0 + step
        journal.status("running", step=step, steps=99, epoch=0)
        written.append(json.loads((tmp_path / "status.json").read_text())["step"])
    assert written == [0] * 10 + [10] * 10 + [20] * 5
    journal.status("stopped", step=25, steps=99, epoch=0)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 25


def test_the_log_has_times_and_no_control_characters(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log("one\ntwo \x1b[31m\udcff")
    journal.log("drei")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", r"two \x1b[31m\udcff", "drei"]
    assert all(datetime.fromisoformat(line.split(" ", 1)[0]) for line in lines)


def everything(journal: Journal) -> None:
    record(journal, 1)
    journal.status("stopped", step=1, steps=2, epoch=0)
    journal.log("text")


def test_a_folder_that_is_gone_warns_once_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "gone")
    for _ in range(3):
        everything(journal)
    assert journal.failures == {"metrics.jsonl": 3, "status.json": 3, "train.log": 3}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "metrics.jsonl cannot be written" in error
    assert "No such file" in error
    (tmp_path / "gone").mkdir()  # it works again as soon as the disk does
    everything(journal)
    assert steps(tmp_path / "gone") == [1]
    assert sum(journal.failures.values()) == 9


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_nothing_is_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As someone else's run folder may hold one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").write_bytes(b"theirs")
    for name in ("metrics.jsonl", "train.log", "status.json"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
    journal = Journal(tmp_path / "run")
    everything(journal)
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert journal.failures == {"metrics.jsonl": 1, "train.log": 1}
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["none", "closed", "full"])
def test_a_broken_stderr_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "full": Full()}[broken])
    journal = Journal(tmp_path / "gone")
    everything(journal)
    assert sum(journal.failures.values()) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on the size of a file")
def test_a_line_that_only_half_fits_is_taken_back(tmp_path: Path) -> None:
    """A limit on the file's size cuts a write short, as a full disk does."""
    script = """
import resource, signal, sys
from pathlib import Path
from nearkin.training.metrics_log import Journal
folder = Path(sys.argv[1])
journal = Journal(folder)
journal.record("train", stage="s", step=1, epoch=0)
whole = (folder / "metrics.jsonl").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
free = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, free[1]))
journal.record("train", stage="s", step=2, epoch=0)
assert (folder / "metrics.jsonl").read_bytes() == whole
assert journal.failures == {"metrics.jsonl": 1}
resource.setrlimit(resource.RLIMIT_FSIZE, free)
journal.record("train", stage="s", step=3, epoch=0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert steps(tmp_path) == [1, 3]
