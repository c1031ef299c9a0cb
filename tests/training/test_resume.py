"""A run that is killed and resumed is the run that was never killed: weights, bank, teacher, journal."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import finish, ranks, start

from nearkin.cli import run as command
from nearkin.objectives import Objective
from nearkin.training.metrics_log import read_metrics

TINY = [
    *["train", "digits", "--epochs", "2", "--model", "test_resnet", "--batch-size", "64"],
    *["--images-per-class", "40", "--threads", "1", "--log-every", "2", "--quiet"],
    *["--save-minutes", "0.0001"],
]
CONE = [
    *["--objective", "cone", "--objective.bank", "100", "--objective.topk", "10"],
    *["--objective.embedding", "16", "--objective.hidden", "32"],
]
SUPCON = [
    "--objective",
    "supcon",
    "--objective.mode",
    "two-stage",
    "--objective.contrast-share",
    "0.5",
]
CASES = {
    "cone": [*CONE, "--ema", "0.9"],
    "cone-own-crop-mixed": [*CONE, "--objective.teacher-crop", "own", "--augment", "strong"],
    "cone-bf16-clipped-in-parts": [
        *[*CONE, "--precision", "bf16", "--memory-format", "channels_last"],
        *["--clip-grad", "0.5", "--accumulate", "2", "--drop-path", "0.2"],
    ],
    "supcon": SUPCON,
    "supcon-balanced": ["--objective", "supcon", "--sampler", "balanced"],
    "ce-weighted": ["--objective", "ce", "--sampler", "weighted", "--class-weights", "balanced"],
    "ce-lamb-dropout": ["--objective", "ce", "--optimizer", "lamb", "--drop-rate", "0.3"],
}
# Every other objective with its defaults: a new file gets this by existing.
CASES |= {n: ["--objective", n] for n in sorted(Objective.registry) if n not in (*CASES, "ce")}


def arguments(case):
    return TINY + CASES[case]


def steps(folder):
    path = folder / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def killed_at(process, folder, step):
    """Wait until the journal shows `step`, then kill; False when the process ended first."""
    while process.is_alive():
        if steps(folder) >= step:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return True
        time.sleep(0.005)
    return False


def everything(folder):
    """All tensors of the last checkpoint and of the model, and the journal without its clock."""
    last = max((folder / "checkpoints").glob("step-*"))
    tensors = {
        f"{file.name}/{name}": tensor
        for file in [*last.glob("*.safetensors"), folder / "model.safetensors"]
        for name, tensor in load_file(file).items()
    }
    journal = read_metrics(folder / "metrics.jsonl")
    for record in journal:
        del record["clock"]
    state = json.loads((last / "state.json").read_text())
    return tensors, journal, state


def bits(tensor):
    """All bytes, whatever the type: NumPy knows no bfloat16."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(folder, other):
    (tensors, journal, state), (tensors2, journal2, state2) = everything(folder), everything(other)
    assert tensors.keys() == tensors2.keys()
    different = [n for n, t in tensors.items() if bits(t) != bits(tensors2[n])]
    assert different == []
    assert journal == journal2
    assert state == state2
    assert (folder / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()


def uninterrupted(case, folder, tmp_path):
    assert finish(
        start(command, [*arguments(case), "--out", str(folder)], log=tmp_path / "log")
    ) == [0]


def with_kills(case, folder, tmp_path, points):
    words = [*arguments(case), "--out", str(folder)]
    killed = 0
    for point in points:
        killed += killed_at(start(command, words, log=tmp_path / "log"), folder, point)
        if (folder / "config.yaml").exists():
            words = ["train", "--resume", str(folder), "--quiet"]
    assert finish(start(command, words, log=tmp_path / "log")) == [0], (
        tmp_path / "log"
    ).read_text()
    return killed


def test_killed_twice_and_resumed_is_the_same_run(tmp_path):
    uninterrupted("cone", tmp_path / "whole", tmp_path)
    assert with_kills("cone", tmp_path / "killed", tmp_path, [3, 8]) == 2
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_many_points_and_resumed_is_the_same_run(case, tmp_path):
    uninterrupted(case, tmp_path / "whole", tmp_path)
    killed = with_kills(case, tmp_path / "killed", tmp_path, [1, 2, 4, 5, 6, 7, 9, 10, 11])
    assert killed >= 5
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_workers_change_nothing(tmp_path):
    uninterrupted("cone", tmp_path / "whole", tmp_path)
    words = [*arguments("cone"), "--out", str(tmp_path / "workers"), "--workers", "2"]
    assert finish(start(command, words, log=tmp_path / "log")) == [0]
    assert_same(tmp_path / "whole", tmp_path / "workers")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75(tmp_path, number):
    folder = tmp_path / "run"
    words = [*arguments("cone"), "--out", str(folder), "--epochs", "50", "--save-minutes", "60"]
    process = start(command, words, log=tmp_path / "log")
    while process.is_alive() and steps(folder) < 12:
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert finish(process) == [75]
    stood = json.loads((folder / "status.json").read_text())
    saved = max((folder / "checkpoints").glob("step-*")).name
    assert stood["state"] == "stopped"
    assert int(saved.split("-")[1]) == stood["step"] >= 12
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert "nearkin: stopped:" in text


def test_a_second_interrupt_ends_at_once(tmp_path):
    folder = tmp_path / "run"
    words = [*arguments("cone"), "--out", str(folder), "--epochs", "50"]
    process = start(_deaf, words, log=tmp_path / "log")
    while process.is_alive() and steps(folder) < 4:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # stuck in a step that never ends
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 75


def _deaf(words):
    """A run whose step hangs once it was asked to stop."""
    from nearkin.training.step import Stepper

    plain = Stepper.step

    def stuck(self, batch, progress, step):
        if step == 5:
            while True:
                time.sleep(0.05)
        return plain(self, batch, progress, step)

    Stepper.step = stuck
    return command(words)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    words = [*arguments("cone"), "--out", str(folder), "--epochs", "50", "--save-minutes", "60"]
    process = start(command, words, log=tmp_path / "log")
    while process.is_alive() and steps(folder) < 2:
        time.sleep(0.01)
    second = tmp_path / "second"
    again = ["train", "--resume", str(folder), "--quiet"]
    assert finish(start(command, again, log=second)) == [2]
    assert "Another process is training" in second.read_text()
    process.kill()
    process.join()
    # The lock ended with its process: the next one may go on, here until it is asked to stop.
    reached = steps(folder)
    process = start(command, again, log=second)
    while process.is_alive() and steps(folder) <= reached:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == [75], second.read_text()


def test_a_signal_before_the_first_step_is_no_crash(tmp_path):
    process = start(
        _slow_to_start, [*arguments("cone"), "--out", str(tmp_path / "run")], log=tmp_path / "log"
    )
    while process.is_alive() and not (tmp_path / "log").exists():
        time.sleep(0.01)
    while "loading" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == [75]
    assert "nearkin: stopped: interrupted" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def _slow_to_start(words):
    """A run whose data take for ever to load."""
    import sys

    from nearkin.training import prepare as job

    def slow(*_, **__):
        print("loading", file=sys.stderr, flush=True)
        time.sleep(60)

    job.choose = slow
    return command(words)


def test_two_processes_resume_the_same_too(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "log"

    def pair(words):
        return [start(command, words, env=env, log=log) for env in ranks(2)]

    assert finish(*pair([*arguments("cone"), "--out", str(whole)])) == [0, 0], log.read_text()
    both = pair([*arguments("cone"), "--out", str(killed)])
    assert killed_at(both[0], killed, 6)
    both[1].kill()
    both[1].join()
    assert finish(*pair(["train", "--resume", str(killed), "--quiet"])) == [0, 0], log.read_text()
    assert_same(whole, killed)
