"""What torchrun and srun say of a launch, the cores of a process, and the mask of the stop signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nearkin import process
from nearkin.cli import VERBS
from nearkin.cli import run as command
from nearkin.errors import ConfigError
from nearkin.process import (
    Launch,
    cores,
    gpu_of,
    launched,
    refuse_other_launchers,
    stop_requested,
    stop_signals_recorded,
)

TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "6"},
    **{"LOCAL_RANK": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
    **{"SLURM_JOB_ID": "4071234", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0"},
}


@pytest.fixture
def env(monkeypatch):
    for name in os.environ:
        launchers = ("SLURM_", "MASTER_", "TORCHELASTIC_", "OMPI_", "PMI_")
        if name.startswith(launchers) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    monkeypatch.setattr(process, "CONTAINER", Path("/nowhere"))

    def change(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


class _Terminal:
    def __init__(self, there):
        self.isatty = lambda: there


def test_without_a_launcher_there_is_one_process(env, monkeypatch):
    assert launched() == Launch(nodes=1, per_node=1, rank=0, local_rank=0)
    env(SLURM | {"SLURM_JOB_NAME": "bash"})
    monkeypatch.setattr(sys, "stdin", _Terminal(True))
    assert launched().world_size == 1


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_task_of_srun_inside_an_allocation_is_one_of_several(env, monkeypatch, name):
    """It has the name of the job whose shell it was started from, but no terminal."""
    env(SLURM | {"SLURM_JOB_NAME": name})
    for stdin in (_Terminal(False), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert launched().world_size == 6


def test_two_steps_of_a_job_do_not_meet(env):
    env(SLURM | {"SLURM_NODELIST": "a[1-9]", "SLURM_STEP_NODELIST": "a[4-6]"})
    first = launched()
    env({"SLURM_STEP_ID": "1"})
    second = launched()
    assert (first.address, second.address) == ("a4", "a4")
    assert first.port != second.port
    assert (first.name, second.name) == ("4071234.0", "4071234.1")


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ],
)
def test_processes_of_another_launcher_are_refused(env, capsys, rank, size):
    """Each of them would train for itself, in the same folder."""
    env({rank: "0", size: "1"})
    assert launched() == Launch()
    env({size: "4"})
    assert command(["train", "digits", "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert f"{size} says that this is one of 4 processes" in said
    assert said.count("\n") == 1
    assert launched() == Launch()  # predict and others may run so: each process its share
    env({"SLURM_JOB_ID": "77"})  # without srun
    if size == "PMI_SIZE":  # which a shell of Slurm may have
        refuse_other_launchers()
    else:
        with pytest.raises(ConfigError, match="each would train for itself"):
            refuse_other_launchers()
    for launcher in (SLURM, TORCHRUN):
        env(launcher)
        refuse_other_launchers()


def test_a_port_that_cannot_be(env, capsys):
    env(SLURM | {"MASTER_PORT": "70000"})
    assert command(["train", "digits"]) == 2
    assert "MASTER_PORT is 70000, above 65535." in capsys.readouterr().err


@pytest.mark.parametrize("step", ["", "4294967291", "4294967290"])
def test_a_batch_script_is_one_process(env, step):
    """It has the number of tasks that srun would start."""
    env(SLURM | {"SLURM_STEP_ID": step, "SLURM_PROCID": "0"})
    assert launched() == Launch()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_NTASKS", ""),
        ("SLURM_JOB_ID", "1; touch x"),
        ("SLURM_PROCID", "-1"),
        ("MASTER_PORT", "x"),
    ],
)
def test_what_is_no_number_is_said(env, capsys, name, value):
    env(SLURM | {name: value})
    assert command(["train", "digits"]) == 2
    said = capsys.readouterr().err
    assert f"{name} is {value!r}, but must be a whole number" in said
    assert said.count("\n") == 1


def test_unequal_tasks_are_refused(env):
    env(SLURM | {"SLURM_NNODES": "4"})
    with pytest.raises(ConfigError, match="6 tasks on 4 nodes; start equally many"):
        launched()


@pytest.mark.parametrize(
    "values",
    [
        {"WORLD_SIZE": "7"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"},  # the other has 3
    ],
)
def test_unequal_nodes_of_torchrun_are_refused(env, values):
    env(TORCHRUN | values)
    with pytest.raises(ConfigError, match="on this node; start equally many on each node"):
        launched()


def test_ranks_that_do_not_go_node_after_node_are_refused(env):
    env(SLURM | {"SLURM_PROCID": "4", "SLURM_LOCALID": "1"})  # --distribution=cyclic
    with pytest.raises(ConfigError, match="--distribution=block"):
        launched()


def test_torchrun(env):
    env(TORCHRUN)
    assert launched() == Launch(2, 4, 6, 2, "gpu1", 29500, "x")
    assert launched().world_size == 8


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("host0,host1", "host0"),
        ("a-1-[2-4]", "a-1-2"),
        ("single", "single"),
    ],
)
def test_slurm(env, nodes, first):
    env(SLURM | {"SLURM_NODELIST": nodes})
    assert launched() == Launch(3, 2, 5, 1, first, 16234, "4071234.0")
    env({"MASTER_ADDR": "other", "MASTER_PORT": "1234"})
    assert launched()[4:6] == ("other", 1234)


def test_each_process_gets_its_share_of_the_cores(env, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert cores() == 12
    env(TORCHRUN)
    assert cores() == 3
    env({"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "6"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores() == 1


def test_a_container_may_allow_fewer_cores(env, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(process, "CONTAINER", tmp_path)
    for text, expected in (("max 100000", 12), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert cores() == expected


def test_slurm_divides_the_cores_itself(env, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    env(SLURM | {"SLURM_CPUS_PER_TASK": "4"})
    assert cores() == 4


def test_torchrun_inside_a_task_shares_the_cores_of_the_task(env):
    env(TORCHRUN | SLURM | {"SLURM_CPUS_PER_TASK": "16"})
    assert cores() == 4


def test_a_closed_terminal_stops_a_run_but_not_under_nohup():
    for before, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        earlier = signal.signal(signal.SIGHUP, before)
        try:
            with stop_signals_recorded():
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop_requested() == stops
            assert signal.getsignal(signal.SIGHUP) is before
        finally:
            signal.signal(signal.SIGHUP, earlier)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_stop_signal_is_recorded_once_and_forgotten(name):
    assert not stop_requested()
    with stop_signals_recorded():
        os.kill(os.getpid(), getattr(signal, name))
        assert stop_requested()
        assert not stop_requested(60)
    assert not stop_requested()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_signal_ends_every_verb_as_ctrl_c_does(monkeypatch, capsys, verb, number):
    def main(_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(f"nearkin.cli.{VERBS[verb]}.main", main)
    seen = []
    earlier = signal.signal(number, lambda *_: seen.append(number))
    try:
        assert command([verb]) == 75
        assert capsys.readouterr().err == "nearkin: stopped: interrupted.\n"
        assert not seen
        os.kill(os.getpid(), number)
        assert seen  # the caller has its handler back
    finally:
        signal.signal(number, earlier)


def test_a_verb_runs_outside_the_main_thread(capsys):
    """Where Python allows no handlers."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(command(["list", "recipes"])))
    thread.start()
    thread.join()
    assert codes == [0]


TWICE = """
import os, signal, time
from nearkin.process import stop_signals_recorded
with stop_signals_recorded():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_second_ctrl_c_leaves_a_terminal_with_its_cursor():
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", TWICE], stderr=theirs, timeout=60)
    os.close(theirs)
    said = os.read(ours, 1000).decode()
    os.close(ours)
    assert done.returncode == 75
    assert said.startswith("\x1b[?25h")  # shows it
    assert "nearkin: stopped at once." in said


CHILD = """
import signal, subprocess, sys
from nearkin.process import stop_signals_blocked
code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
with stop_signals_blocked():
    inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
print(inside.count("SIG"), outside.count("SIG"))
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_children_inherit_the_mask_only_within_the_block():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout == "6 0\n"


@pytest.mark.parametrize(
    ("visible", "torchrun", "expected"),
    [(4, True, 2), (4, False, 2), (1, False, 0), (1, True, None), (2, False, None)],
)
def test_the_gpu_of_a_process(monkeypatch, visible, torchrun, expected):
    """Local rank 2 of 4: Slurm may show each task one GPU only, its own."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    launch = Launch(1, 4, 2, 2)
    if expected is None:
        with pytest.raises(ConfigError, match="4 processes on this node, which sees"):
            gpu_of(launch, visible)
    else:
        assert gpu_of(launch, visible) == expected
