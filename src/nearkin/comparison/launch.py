"""Runs of a comparison as processes on this machine, as a SLURM array, or on a Ray cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nearkin.comparison.run import PARENT
from nearkin.errors import ConfigError, Stopped, printable
from nearkin.files import write_atomic
from nearkin.process import cores, stop_handler

POLL = 0.2  # seconds between two looks at the processes
PATIENCE = 60.0  # seconds that they have to save after a stop
SCRIPT = "array.sh"
MODULE = "nearkin.comparison.run"


def local(
    folder: Path, names: Sequence[str], number: int, ended: Callable[[str, int], None]
) -> None:
    """Run `names` in FOLDER, `number` at a time, each with its share of the cores.

    ended: called with the name and exit code of each run that has ended. A stop signal is sent on to the runs, which
    save; then Stopped is raised. A run that fails does not end the others.
    """
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    machine = share(number)
    stopping: list[int] = []
    with stop_handler(lambda number, _: stopping.append(number)), _all_ended(running):
        while waiting or running:
            while waiting and len(running) < number and not stopping:
                name = waiting.pop(0)
                running[name] = start(folder, name, machine)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    ended(name, process.returncode)
            if stopping and not running:
                break
            if stopping:
                stop(running.values())
            time.sleep(POLL)
    if stopping:
        raise Stopped("Stopped on request; the runs are saved, give the same command to go on.")


def share(number: int) -> list[str]:
    """Threads and loader processes of each of `number` runs at a time; empty for one, which takes what it wants."""
    threads = max(1, cores() // number)
    return [str(threads), "0" if threads == 1 else "auto"] if number > 1 else []


def start(folder: Path, name: str, machine: Sequence[str]) -> subprocess.Popen[bytes]:
    """The run in a session of its own: Ctrl-C reaches this process alone, which sends it on once."""
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command(folder, name, machine),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {PARENT: str(os.getpid())},
            start_new_session=True,
        )


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to save and end; kill those that do not within a minute."""
    asked = [process for process in processes if process.poll() is None]
    for process in asked:
        process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and any(process.poll() is None for process in asked):
        time.sleep(POLL)
    for process in asked:
        process.kill()
        process.wait()


@contextmanager
def _all_ended(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens, no process is left behind."""
    try:
        yield
    finally:
        if running:
            stop(running.values())


def command(folder: Path, name: str, machine: Sequence[str] = ()) -> list[str]:
    """The command of one run."""
    return [sys.executable, "-m", MODULE, str(folder), name, *machine]


def slurm(folder: Path, names: Sequence[str], number: int | None) -> str:
    """Write an array script with one task for each run, and submit it with `sbatch`. Returns what sbatch printed.

    number: tasks at a time, None for no limit. Partition, time and GPUs come from the environment, as SBATCH_PARTITION,
    SBATCH_TIMELIMIT and SBATCH_GPUS_PER_TASK, or are written into the script, which a later call keeps. The folder must
    be shared by the nodes.

    Raises ConfigError where there is no sbatch, or where it refuses.
    """
    script = folder / SCRIPT
    if not script.exists():
        lines = [
            "#!/bin/bash",
            "#SBATCH --job-name=nearkin-compare",
            f"#SBATCH --output={folder}/slurm-%a.log",
            "#SBATCH --signal=B:TERM@60",
            "# Each task takes its line of runs.txt; add options such as #SBATCH --gpus=1 above.",
            f'name=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / "runs.txt"))})',
            "unset SLURM_NTASKS  # one process, whatever the allocation",
            f'exec {shlex.join(command(folder, "NAME")[:-1])} "$name"',
        ]
        write_atomic(script, ("\n".join(lines) + "\n").encode())
    write_atomic(folder / "runs.txt", ("\n".join(names) + "\n").encode())
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError(
            f"There is no sbatch on this machine; run `sbatch --array=0-{len(names) - 1} "
            f"{printable(str(script))}` where there is one, then give the same command again."
        )
    limit = f"%{number}" if number else ""
    array = f"--array=0-{len(names) - 1}{limit}"
    done = subprocess.run([sbatch, array, str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused: {printable(done.stderr.strip()[:300])}")
    return done.stdout.strip()


def ray(folder: Path, names: Sequence[str], ended: Callable[[str, int], None]) -> None:
    """Run `names` as tasks of the Ray cluster at RAY_ADDRESS, or of a new one on this machine. The folder must be
    shared by the nodes. Each task takes a GPU where the cluster has any, else two CPUs where nodes have them.
    """
    import ray as cluster

    cluster.init(ignore_reinit_error=True, log_to_driver=False)
    resources: dict[str, float] = cluster.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = resources.get("GPU", 0) > 0

    @cluster.remote(num_cpus=1, num_gpus=int(gpus), max_retries=3)
    def task(name: str) -> tuple[str, int]:
        words = command(folder, name, [] if gpus else ["1", "0"])
        return name, subprocess.run(words, check=False).returncode

    waiting = [task.remote(name) for name in names]
    try:
        while waiting:
            done, waiting = cluster.wait(waiting)
            ended(*cluster.get(done[0]))
    except KeyboardInterrupt:
        for each in waiting:
            cluster.cancel(each)
        raise
    finally:
        cluster.shutdown()
