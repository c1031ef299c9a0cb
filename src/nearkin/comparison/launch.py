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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from nearkin.comparison.run import PARENT
from nearkin.config import Auto
from nearkin.errors import ConfigError, Stopped, printable
from nearkin.files import write_atomic
from nearkin.process import GPU_THREADS, SHARE, container_limit, cores, stop_handler

POLL = 0.2  # seconds between two looks at the processes
PATIENCE = 60.0  # seconds that they have to save after a stop
STOPPED = "Stopped on request; the runs are saved, give the same command to go on."
SCRIPT = "array.sh"
SUBMITTED = "array.id"
VISIBLE = "CUDA_VISIBLE_DEVICES"
ROOM = 2 << 30  # bytes of memory for each run on a CPU
MODULE = "nearkin.comparison.run"
MANY = 1_000_000  # runs, to share a machine as if it were full


class Machine(NamedTuple):
    """How runs share this machine. number: at a time. gpus: names for CUDA_VISIBLE_DEVICES; empty without."""

    number: int
    gpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, jobs: int | Auto, runs: int, device: str, gpus: tuple[str, ...]) -> Machine:
        """`--jobs auto`: one run for each GPU; on a CPU one for each core, as far as the memory goes."""
        room = max(1, _free_memory() // ROOM)
        usual = min(cores(), room) if device == "cpu" else max(1, len(gpus))
        return cls(min(usual if jobs == "auto" else jobs, runs), gpus)

    def words(self) -> list[str]:
        """Threads and loader processes of each run; empty for one alone, which takes what it wants."""
        share = self.share()
        threads = min(GPU_THREADS, share) if self.gpus else share
        return [str(threads), "0" if share == 1 else "auto"] if self.number > 1 else []

    def share(self) -> int:
        """Cores of each run."""
        return max(1, cores() // self.number)

    def environment(self, place: int) -> dict[str, str]:
        """That of the run at this place, 0 ... number - 1."""
        own = {PARENT: str(os.getpid())}
        if self.number > 1:
            own[SHARE] = str(self.share())
        if self.gpus:
            own[VISIBLE] = self.gpus[place % len(self.gpus)]
        return os.environ | own


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    given = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return tuple(given or map(str, range(torch.cuda.device_count())))


def _free_memory() -> int:
    """Bytes that may be used, of the machine and of a container; very many where the system does not tell."""
    # Not memory.current: it counts the page cache, which images that were read may fill.
    return min([_free_of_machine(), *container_limit("memory.max")])


def _free_of_machine() -> int:
    """With what the page cache would give back."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    if not (hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names):
        return 1 << 60
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def local(
    folder: Path, names: Sequence[str], machine: Machine, ended: Callable[[str, int], None]
) -> None:
    """Run `names` in FOLDER.

    ended: called with the name and exit code of each run that has ended. A stop signal is sent on to the runs, which
    save; then Stopped is raised. A run that fails does not end the others.
    """
    waiting, places = list(names), list(range(machine.number))
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    stopping: list[int] = []
    with stop_handler(lambda number, _: stopping.append(number)), _all_ended(running):
        while waiting or running:
            while waiting and places and not stopping:
                name, place = waiting.pop(0), places.pop(0)
                running[name] = place, start(folder, name, machine, place)
            for name, (place, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    places.append(place)
                    killed = stopping and process.returncode == -signal.SIGKILL  # by `stop`
                    ended(name, Stopped.code if killed else process.returncode)
            if stopping and not running:
                break
            if stopping:
                stop(process for _, process in running.values())
            time.sleep(POLL)
    if stopping:
        raise Stopped(STOPPED)


def start(folder: Path, name: str, machine: Machine, place: int) -> subprocess.Popen[bytes]:
    """The run in a session of its own: Ctrl-C reaches this process alone, which sends it on once."""
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command(folder, name, machine.words()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=machine.environment(place),
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


def outcome(runs: Path, name: str, code: int) -> str:
    """How a run ended, in words."""
    from nearkin.evaluation.model import read_description

    if code == 0:
        metrics = read_description(runs / name).metrics
        return f"{name}  {metrics['split']} top-1 {100 * metrics['top1']:.2f} %"
    try:
        return f"{name}  failed: {(runs / f'{name}.error').read_text(encoding='utf-8').strip()}"
    except OSError:
        return f"{name}  {'stopped' if code == Stopped.code else f'failed: it ended with {code}'}"


@contextmanager
def _all_ended(running: dict[str, tuple[int, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """Whatever happens, no process is left behind."""
    try:
        yield
    finally:
        stop(process for _, process in running.values())


def command(folder: Path, name: str, machine: Sequence[str] = ()) -> list[str]:
    """The command of one run."""
    return [sys.executable, "-m", MODULE, str(folder), name, *machine]


def slurm(folder: Path, names: Sequence[str], number: int | None) -> str:
    """Write an array script with one task for each run, and submit it with `sbatch`. Returns what sbatch printed.

    number: tasks at a time, None for no limit. Partition, time and GPUs come from the environment, as SBATCH_PARTITION,
    SBATCH_TIMELIMIT and SBATCH_GPUS_PER_TASK, or are written into the script, which a later call keeps. The folder must
    be shared by the nodes.

    Raises ConfigError where there is no sbatch, where it refuses, and while tasks of an earlier call wait or run.
    """
    script, listed = folder / SCRIPT, _new_list(folder)
    before = {name for each in folder.glob("array-*.txt") for name in each.read_text().split("\n")}
    submitted = folder / SUBMITTED
    if submitted.exists() and _in_queue(submitted.read_text(encoding="utf-8").strip()):
        raise ConfigError(
            f"Tasks of the array {submitted.read_text(encoding='utf-8').strip()} still wait or run; give the command "
            "again when they have ended."
        )
    if not script.exists():
        _write_script(script)
    write_atomic(listed, ("\n".join(names) + "\n").encode())
    limit = f"%{number}" if number else ""
    array, logs = f"--array=0-{len(names) - 1}{limit}", f"--output={folder}/slurm-%A-%a.log"
    words = ["--parsable", array, logs, str(script), str(listed)]
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError(
            f"There is no sbatch on this machine; run `{printable(shlex.join(['sbatch', *words[1:]]))}` where there "
            "is one, then give the same command again."
        )
    failures = {folder / f"{name}.error" for name in names}
    earlier = {path: path.read_bytes() for path in failures if path.exists()}
    lost = [n for n in names if n in before and folder / f"{n}.error" not in earlier]
    for path in earlier:  # they wait from now on
        path.unlink()
    done = subprocess.run([sbatch, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        listed.unlink()
        for path, content in earlier.items():
            write_atomic(path, content)
        raise ConfigError(f"sbatch refused: {printable(done.stderr.strip()[:300])}")
    job = done.stdout.strip().partition(";")[0]
    write_atomic(submitted, f"{job}\n".encode())
    told = f"submitted as the array {printable(job)}"
    if lost:
        told += f"; {len(lost)} had ended without a result or an error, for want of time or memory: see slurm-*.log"
    return told


def _write_script(script: Path) -> None:
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=nearkin-compare",
        "#SBATCH --signal=B:TERM@60",
        "# Add options of your cluster above, such as #SBATCH --gpus=1. $1 lists the runs, a line each.",
        'name=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")',
        "unset SLURM_NTASKS  # one process, whatever the allocation",
        f'exec {shlex.join(command(script.parent, "NAME")[:-2])} "$(dirname "$1")" "$name"',
    ]
    write_atomic(script, ("\n".join(lines) + "\n").encode())


def _new_list(folder: Path) -> Path:
    """A file for the names of this submission: tasks that wait still read the one of theirs."""
    number = len(list(folder.glob("array-*.txt"))) + 1
    return folder / f"array-{number}.txt"


def _in_queue(job: str) -> bool:
    """Whether squeue knows tasks of the array; not where there is no squeue."""
    squeue = shutil.which("squeue")
    if squeue is None:
        return False
    done = subprocess.run(
        [squeue, "--noheader", "--jobs", job], capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def ray(folder: Path, names: Sequence[str], ended: Callable[[str, int], None]) -> None:
    """Run `names` as tasks of the Ray cluster at RAY_ADDRESS, or of a new one on this machine. The folder must be
    shared by the nodes. Each task takes one CPU, and a GPU where the cluster has any.
    """
    import ray as cluster

    cluster.init(ignore_reinit_error=True, log_to_driver=False)
    resources: dict[str, float] = cluster.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = resources.get("GPU", 0) > 0

    here = Path.cwd()  # a worker has the folder in which its node was started

    @cluster.remote(num_cpus=1, num_gpus=int(gpus), max_retries=3)
    def task(name: str) -> tuple[str, int]:
        words = command(folder, name, [] if gpus else ["1", "0"])
        node = cluster.get_runtime_context().get_node_id()
        with (folder / f"{name}.log").open("ab") as log:
            log.write(f"on the node {node}\n".encode())
            log.flush()
            env = os.environ | {PARENT: str(os.getpid())}
            process = subprocess.Popen(words, cwd=here, env=env, stdout=log, stderr=log)
        try:
            return name, process.wait()
        except KeyboardInterrupt:  # it was cancelled
            stop([process])
            return name, Stopped.code

    tasks = {task.remote(name): name for name in names}
    waiting = list(tasks)
    try:
        while waiting:
            (done, *_), waiting = cluster.wait(waiting)
            try:
                ended(*cluster.get(done))
            # Its node is gone, or its worker died again and again.
            except cluster.exceptions.RayError:
                ended(tasks[done], 1)
    except KeyboardInterrupt:
        for each in waiting:
            cluster.cancel(each)
        cluster.wait(waiting, num_returns=len(waiting), timeout=PATIENCE)
        raise Stopped(STOPPED) from None
    finally:
        cluster.shutdown()
