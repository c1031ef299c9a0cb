"""Two processes of which one fails: both end within a minute, with one message and one exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tests.pictures import write_classes
from tests.processes import finish, ranks, start

from nearkin.cli import run as command

LIMIT = 60  # seconds from the failure, by issue 17
WORDS = [
    *["--objective", "ce", "--model", "test_resnet", "--image-size", "16", "--batch-size", "8"],
    *["--threads", "1", "--cache", "off", "--log-every", "1", "--quiet"],
]


def fail(error):
    if "FAILED" in os.environ:
        Path(os.environ["FAILED"]).touch()
    raise error


def scanning():
    from nearkin.training import prepare

    def load(*_, **__):
        fail(OSError(5, "planted error"))

    prepare.choose = load


def lock():
    from nearkin.errors import ConfigError
    from nearkin.training import trainer

    def locked(*_, **__):
        fail(ConfigError("planted error"))

    trainer.locked = locked


def save():
    from nearkin.files import SaveFailed
    from nearkin.training.checkpoint.store import Store

    def refuse(*_, **__):
        fail(SaveFailed("planted error"))

    Store.save = refuse


def validation():
    from nearkin.training.trainer import Trainer

    def validate(_):
        fail(ZeroDivisionError("planted error"))

    Trainer._validate = validate


def memory():
    from nearkin.training.step import Stepper

    def step(*_):
        fail(MemoryError("planted error"))

    Stepper.step = step


def planted(words, failing, plant):
    if int(os.environ["RANK"]) == failing:
        plant()
    return command(words)


def launch(tmp_path, *arguments, function=planted):
    """The exit codes of two processes without an agent that ends one when the other fails, and their output."""
    write_classes(tmp_path / "data", each=16)
    words = ["train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *WORDS]
    log = tmp_path / "log"
    failed = {"FAILED": str(tmp_path / "failed")}
    processes = [start(function, words, *arguments, env=env | failed, log=log) for env in ranks(2)]
    while any(process.is_alive() for process in processes) and not (tmp_path / "failed").exists():
        time.sleep(0.05)  # imports and training before the failure may take longer
    for process in processes:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes], log.read_text()


@pytest.mark.parametrize(
    ("failing", "plant", "code", "state"),
    [
        pytest.param(1, scanning, 1, None, id="scanning-1"),
        pytest.param(0, scanning, 1, None, id="scanning-0", marks=pytest.mark.slow),
        pytest.param(0, lock, 2, None, id="lock-0"),
        pytest.param(0, save, 75, "stopped", id="save-0", marks=pytest.mark.slow),
        pytest.param(1, validation, 1, "failed", id="validation-1"),
        pytest.param(0, validation, 1, "failed", id="validation-0", marks=pytest.mark.slow),
        pytest.param(1, memory, 6, "failed", id="memory-1", marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_process_ends_both(tmp_path, failing, plant, code, state):
    codes, text = launch(tmp_path, failing, plant)
    assert codes == [code, code], text
    assert text.count("\n") == 1
    assert ("The memory ran out" if plant is memory else "planted error") in text
    if state is not None:
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == state
        assert status["message"] in text


def both(words, extra):
    return command([*words, *extra])


@pytest.mark.slow
def test_an_error_on_both_is_printed_once(tmp_path):
    codes, text = launch(tmp_path, ["--batch-size", "7"], function=both)
    assert codes == [2, 2], text
    assert text.count("\n") == 1
    codes, text = launch(tmp_path / "second", ["--no-such-option"], function=both)
    assert codes == [2, 2], text
    assert text.count("\n") == 1


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_both(tmp_path):
    write_classes(tmp_path / "data", each=16)
    folder, log = tmp_path / "run", tmp_path / "log"
    words = ["train", str(tmp_path / "data"), "--out", str(folder), *WORDS, "--epochs", "1000"]
    processes = [start(command, words, env=env, log=log) for env in ranks(2)]
    while not (folder / "metrics.jsonl").exists():
        assert processes[0].is_alive()
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [75, 75]
    assert log.read_text().count("\n") == 1
    step = json.loads((folder / "status.json").read_text())["step"]
    assert (folder / "checkpoints" / f"step-{step:010d}").is_dir()


@pytest.mark.slow
def test_the_others_end_when_the_first_process_is_killed(tmp_path):
    codes, text = launch(tmp_path, 0, killed)
    assert codes == [-9, 75], text
    assert "process of this launch died" in text


def killed():
    from nearkin.training.trainer import Trainer

    Trainer._validate = lambda _: os.kill(os.getpid(), signal.SIGKILL)


def failing_at_five(run, monkeypatch):
    """A run with a checkpoint of step 5, at which every try in this process fails."""
    import nearkin
    from nearkin.training.step import Stepper

    plain = Stepper.step

    def step(self, batch, progress, number):
        if number == 5:
            raise ZeroDivisionError("planted error")
        return plain(self, batch, progress, number)

    monkeypatch.setattr(Stepper, "step", step)
    options = {"images_per_class": 12, "batch_size": 16, "model": "test_resnet", "threads": 1}
    with pytest.raises(ZeroDivisionError):
        nearkin.train("digits", "ce", out=run, epochs=2, save_minutes=1e-6, **options)
    assert (run / "checkpoints" / "step-0000000005").is_dir()


def test_a_failure_right_after_a_resume_names_the_step(tmp_path, monkeypatch):
    import nearkin

    run = tmp_path / "run"
    failing_at_five(run, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        nearkin.train(resume=run)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 5)
    assert status["message"] == "ZeroDivisionError: planted error"


def diverging(words):
    """Each process writes down its images of step 3, whose loss is not finite on the second one."""
    from nearkin.training.step import Stepper

    plain, rank = Stepper.step, os.environ["RANK"]

    def step(self, batch, progress, number):
        loss = plain(self, batch, progress, number)
        if number == 3:
            seen = {"index": batch.index.tolist(), "labels": batch.labels.tolist()}
            Path(f"{os.environ['FAILED']}-{rank}").write_text(json.dumps(seen))
            loss = loss._replace(total=loss.total * (float("nan") if rank == "1" else 1))
        return loss

    Stepper.step = step
    return command(words)


def test_the_replay_lists_the_images_of_all_processes(tmp_path):
    codes, text = launch(tmp_path, function=diverging)
    assert codes == [6, 6], text
    replay = json.loads((tmp_path / "run" / "replay.json").read_text())
    assert replay["step"] == 3
    first, second = (json.loads((tmp_path / f"failed-{n}").read_text()) for n in (0, 1))
    assert len(set(first["index"]) | set(second["index"])) == 8
    for name in ("index", "labels"):
        assert replay[name] == first[name] + second[name]


SCRIPT = """
import sys
from tests.training import test_failures
from nearkin.cli import run
if __name__ == "__main__":
    sys.exit(test_failures.planted(sys.argv[2:], 1, getattr(test_failures, sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["scanning", "validation"])
def test_torchrun_reports_the_failure_within_a_minute(tmp_path, plant):
    write_classes(tmp_path / "data", each=16)
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    words = ["train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *WORDS]
    done = subprocess.run(
        [
            *[
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ],
            *[str(script), plant, *words],
        ],
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )
    assert done.returncode == 1
    assert done.stderr.count("planted error") == 1, done.stderr


def unreadable():
    """This process alone cannot open the newest checkpoint."""
    from nearkin.training.checkpoint import snapshot

    plain = snapshot._opened

    def opened(path, size=None):
        if path.parent.name == "step-0000000005":
            raise snapshot.Damaged(path.parent, "planted error")
        return plain(path, size)

    snapshot._opened = opened


def test_all_processes_continue_at_the_same_checkpoint_or_end(tmp_path, monkeypatch):
    run, log = tmp_path / "run", tmp_path / "log"
    failing_at_five(run, monkeypatch)
    words = ["train", "--resume", str(run), "--quiet"]
    both = [start(planted, words, 1, unreadable, env=env, log=log) for env in ranks(2)]
    assert finish(*both) == [4, 4], log.read_text()
    assert "another process cannot read (planted error)" in log.read_text()
    assert log.read_text().count("\n") == 1
