"""Runs whose loader has worker processes: signals to the whole group, stuck or dead workers, a full /dev/shm."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.pictures import write_classes
from tests.processes import finish, start

from nearkin.cli import run as command

WORDS = [
    *["--objective", "ce", "--model", "test_resnet", "--image-size", "64", "--batch-size", "8"],
    *["--threads", "1", "--workers", "2", "--cache", "off", "--log-every", "1"],
    *["--save-minutes", "60", "--val-split", "0", "--quiet"],
]


@pytest.fixture
def run(tmp_path):
    """The words of a command that trains for a long time, and its run folder. However the run and its workers end,
    no batch may be left in shared memory."""
    write_classes(tmp_path / "data", each=24)
    folder, before = tmp_path / "run", batches_in_memory()
    yield (
        [
            "train",
            str(tmp_path / "data"),
            "--out",
            str(folder),
            "--epochs",
            "500",
            *WORDS,
        ],
        folder,
    )
    end = time.monotonic() + 10  # those of other tests come and go
    while left := batches_in_memory() - before:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def batches_in_memory():
    return set(Path("/dev/shm").glob("torch_*"))


def wait_for(path, process, limit=60):
    end = time.monotonic() + limit
    while not path.exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)


def own_group(words, method, change=None):
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    if change is not None:
        change()
    return command(words)


def all_end(group, limit=60):
    end = time.monotonic() + limit
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.1)
        pytest.fail("processes are left")


def saved_step(folder):
    return int(max((folder / "checkpoints").glob("step-*")).name.split("-")[1])


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("fork", signal.SIGTERM),
        pytest.param("fork", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("forkserver", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("spawn", signal.SIGUSR2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group_saves_before_the_first_interval(tmp_path, run, method, number):
    words, folder = run
    process = start(own_group, words, method, log=tmp_path / "log")
    wait_for(folder / "metrics.jsonl", process)
    os.killpg(process.pid, number)
    text = tmp_path / "log"
    assert finish(process) == [75], text.read_text()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    assert saved_step(folder) == status["step"] > 0
    assert text.read_text().count("\n") == 1
    again = ["train", "--resume", str(folder), "--quiet"]
    process = start(own_group, again, "fork", log=text)
    steps = len((folder / "metrics.jsonl").read_bytes())
    while process.is_alive() and len((folder / "metrics.jsonl").read_bytes()) <= steps:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert finish(process) == [75], text.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_when_their_run_is_killed(tmp_path, run, method):
    """As for want of memory. A fork server is nobody's child then, and lives as long as a worker does."""
    words, folder = run
    process = start(own_group, words, method, log=tmp_path / "log")
    wait_for(folder / "metrics.jsonl", process)
    process.kill()
    process.join()
    all_end(process.pid)


def reads(change):
    """Let `change` act in the workers when they have read 60 images."""
    from torch.utils.data import get_worker_info

    from nearkin.data.images import Files

    plain, count = Files.read, 0

    def read(self, row):
        nonlocal count
        count += get_worker_info() is not None
        if count > 60:
            change()
        return plain(self, row)

    Files.read = read


def stuck():
    reads(lambda: time.sleep(1000))


def stopped():
    """A worker stops as soon as the main process asks it for the memory of a batch."""
    from multiprocessing.connection import Listener

    plain, asked = Listener.accept, 0

    def accept(self):
        nonlocal asked
        asked += 1
        connection = plain(self)
        if asked > 20:
            os.kill(os.getpid(), signal.SIGSTOP)
        return connection

    Listener.accept = accept


def silent():
    """As `stopped`; and ten minutes pass in two seconds."""
    from nearkin.data import loader

    loader.POLL, loader.OVERDUE = 0.1, 2.0
    stopped()


def dying():
    reads(lambda: os.kill(os.getpid(), signal.SIGKILL))


def leaking():
    """From the fifth step on the main process can open one more file at a time."""
    from nearkin.training.step import Stepper

    plain = Stepper.step

    def step(self, batch, progress, number):
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        if number == 5:
            with suppress(OSError):
                while True:
                    last = os.open(os.devnull, os.O_RDONLY)
            os.close(last)
        return plain(self, batch, progress, number)

    Stepper.step = step


def full():
    import torch

    def share(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    reads(lambda: setattr(torch.Tensor, "share_memory_", share))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "number"),
    [(stuck, signal.SIGTERM), (stuck, signal.SIGINT), (stopped, signal.SIGTERM)],
)
def test_a_run_that_waits_for_a_stuck_worker_saves_and_stops(tmp_path, run, change, number):
    words, folder = run
    process = start(own_group, words, "fork", change, log=tmp_path / "log")
    wait_for(folder / "metrics.jsonl", process)
    time.sleep(5)  # by now both workers are stuck
    os.kill(process.pid, number)
    process.join(30)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 75, text
    assert text.count("\n") == 1
    assert saved_step(folder) == json.loads((folder / "status.json").read_text())["step"] > 0
    all_end(process.pid)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dying, "process that loads images died"),
        (full, "has no room for"),
        (leaking, "raise the limit (ulimit -n)"),
        (silent, "a process that loads them hangs or is stopped"),
    ],
)
def test_steps_before_a_worker_died_are_saved(tmp_path, run, change, words):
    options, folder = run
    assert finish(start(own_group, options, "fork", change, log=tmp_path / "log")) == [75]
    text = (tmp_path / "log").read_text()
    assert text.count("\n") == 1
    assert words in text
    assert "--resume" in text
    assert saved_step(folder) > 0


def in_small_shared_memory(size, *words):
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    if subprocess.run([*mounted, mount], capture_output=True).returncode:
        pytest.skip("needs a kernel that lets this user mount a tmpfs")
    call = [sys.executable, "-m", "nearkin", *words]
    return subprocess.run(
        [*mounted, f'{mount} && exec "$@"', "sh", *call],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_batches_that_do_not_fit_into_shared_memory_are_refused(run):
    words, folder = run
    done = in_small_shared_memory("64k", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--workers 2 needs 4 MiB of shared memory" in done.stderr
    assert "use --workers 0" in done.stderr
    assert not folder.exists()


@pytest.mark.slow
def test_automatic_workers_are_as_many_as_fit_into_shared_memory(run):
    words, folder = run
    place = words.index("--workers")
    words[place + 1], words[words.index("--epochs") + 1] = "auto", "1"
    done = in_small_shared_memory("64k", *words)
    assert done.returncode == 0, done.stderr
    assert "workers: 0" in (folder / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "2m"])
def test_evaluation_says_that_shared_memory_is_full(tmp_path, run, size):
    words, folder = run
    words[words.index("--epochs") + 1] = "1"
    assert finish(start(command, words, log=tmp_path / "log")) == [0]
    done = in_small_shared_memory(
        size, "evaluate", str(folder), "--split", "train", "--workers", "2", "--tta", "tencrop"
    )
    assert done.returncode == 75
    assert done.stderr.count("\n") == 1
    assert "/dev/shm has no room for the batches of --workers 2" in done.stderr


UNGUARDED = """
import multiprocessing, sys
import nearkin
multiprocessing.set_start_method(sys.argv[2], force=True)
try:
    nearkin.train(sys.argv[1], "ce", model="test_resnet", image_size=32, batch_size=8, epochs=1, threads=1,
                  workers=2, cache="off", out=sys.argv[3])
except nearkin.ConfigError as error:
    print(error)
"""


UNGUARDED_FEWSHOT = """
import multiprocessing, sys
import nearkin
multiprocessing.set_start_method(sys.argv[2], force=True)
try:
    nearkin.fewshot(sys.argv[3], sys.argv[1], ways=2, queries=2, episodes=2, copies=1, workers=2)
except nearkin.ConfigError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "program"),
    [("forkserver", UNGUARDED), ("spawn", UNGUARDED), ("spawn", UNGUARDED_FEWSHOT)],
)
def test_a_script_without_a_guard_gets_one_sentence(tmp_path, method, program):
    write_classes(tmp_path / "data")
    if program == UNGUARDED_FEWSHOT:
        words = ["train", "digits", "--epochs", "0", "--out", str(tmp_path / "run"), "--quiet"]
        assert command(words) == 0
    script = tmp_path / "script.py"
    script.write_text(program)
    words = [sys.executable, script, tmp_path / "data", method, tmp_path / "run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert 'if __name__ == "__main__":' in done.stdout
    # Python's resource tracker may warn of the semaphores that a child held when it was ended; which, is a race.
    ours = [
        x
        for x in done.stderr.splitlines()
        if "resource_tracker" not in x and "warnings.warn(" not in x
    ]
    assert ours == []
