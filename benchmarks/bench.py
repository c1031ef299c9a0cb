"""Measurement: calls that alternate in one process, and peak memory of fresh processes."""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

Call = Callable[[], object]
WIDTHS = "  {:<66} {:>9} {:>9} {:>7} {:<3} {:>7} {:>6} {:>7} {:>3} {}"
RUNS, MOST = 15, 4  # on a shared machine the minimum of nine still varies by a tenth


@dataclass
class Row:
    """One row of a table. ratio: in `unit`. higher: whether a ratio above the target is good. limit: the best known to
    be possible, a bound or the result of a prototype. ours, peer: minimum of `runs` runs, in seconds."""

    what: str
    ratio: float
    median: float | None = None
    target: float | None = None
    higher: bool = False
    unit: str = ""
    limit: float | None = None
    ours: float | None = None
    peer: float | None = None
    runs: int | None = None

    @property
    def missed(self) -> bool:
        if self.target is None:
            return False
        return self.ratio < self.target if self.higher else self.ratio > self.target


@dataclass
class Table:
    """title: what is compared. setting: sizes, threads, temperature and the exact calls."""

    title: str
    setting: str
    rows: list[Row]

    def show(self) -> str:
        titles = ("", "ours", "peer", "ratio", "", "medians", "limit", "target", "n", "")
        lines = [f"\n{self.title}", f"  {self.setting}", WIDTHS.format(*titles).rstrip()]
        for row in self.rows:
            target = "" if row.target is None else f"{'>=' if row.higher else '<='} {row.target:g}"
            verdict = "" if row.target is None else ("MISSED" if row.missed else "ok")
            median, limit = _shown(row.median, "{:.2f}"), _shown(row.limit, "{:g}")
            seconds = _seconds(row.ours), _seconds(row.peer)
            ratio, runs = f"{row.ratio:.2f}", _shown(row.runs, "{}")
            cells = (row.what, *seconds, ratio, row.unit, median, limit, target, runs, verdict)
            lines.append(WIDTHS.format(*cells).rstrip())
        return "\n".join(lines)


def _shown(number: float | None, form: str) -> str:
    return "" if number is None else form.format(number)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


RESULTS_LOCK = Lock()  # runs on several cores append to one file


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file of results; none where it does not exist yet."""
    if not path.exists():
        return []
    with RESULTS_LOCK, path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a result, below a header in a new file, so that a series of long runs can go on where it stopped."""
    with RESULTS_LOCK, path.open("a", newline="") as file:
        new = file.tell() == 0
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def alternate(
    calls: dict[str, Call],
    runs: int = RUNS,
    most: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds by `clock` of each call, in alternation, after one warm-up round: `runs` rounds, and up to `most` times
    as many until each call came within 3 % of its minimum three times. On a busy machine a minimum reached once is an
    accident of the load."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(most * runs + 1):
        if number > runs and all(map(settled, seconds.values())):
            break
        for name, call in calls.items():
            start = clock()
            call()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def settled(seconds: list[float]) -> bool:
    """Whether three runs came within 3 % of the minimum."""
    least = sorted(seconds)
    return len(least) >= 3 and least[2] <= 1.03 * least[0]


def ratio(
    seconds: dict[str, list[float]],
    name: str,
    unit: str,
    what: str,
    target: float | None = None,
    higher: bool = False,
    limit: float | None = None,
) -> Row:
    """min(name) / min(unit), or its inverse where higher is better."""
    over, under = (unit, name) if higher else (name, unit)
    medians = statistics.median(seconds[over]) / statistics.median(seconds[under])
    ours, peer = min(seconds[name]), min(seconds[unit])
    minima = peer / ours if higher else ours / peer
    return Row(what, minima, medians, target, higher, "x", limit, ours, peer, len(seconds[name]))


def fastest(
    seconds: dict[str, list[float]], name: str, what: str, target: float | None = None
) -> Row:
    """min(name) in seconds, for a call without a peer."""
    found = seconds[name]
    least, median = min(found), statistics.median(found)
    return Row(what, least, median, target, False, "s", ours=least, runs=len(found))


def extra_memory(
    module: str, name: str, what: str, target: float | None = None, limit: float | None = None
) -> Row:
    """MiB that calling `module.PEAK[name]()` adds to the peak of a fresh process that only prepares it.

    Medians of three processes each, since the peak of a process varies by some MiB.
    """
    peaks = [
        statistics.median(_peak(module, name, call) for _ in range(3)) for call in (True, False)
    ]
    return Row(what, (peaks[0] - peaks[1]) / 1024, None, target, False, "MiB", limit, runs=3)


def _peak(module: str, name: str, call: bool) -> int:
    # Not getrusage: a child inherits its maximum from the parent.
    program = (
        f"import torch; torch.set_num_threads(2); from benchmarks import {module} as m; "
        f"run = m.PEAK[{name!r}](); {'run()' if call else 'pass'}; "
        "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def output(text: str) -> Path:
    """An argument that names a file in a folder that exists, checked before minutes of measuring."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def machine() -> dict[str, object]:
    """The machine that the numbers are from."""
    return {
        "processor": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(tables: list[Table], path: Path) -> None:
    """Write every number and the machine as JSON."""
    content = {"machine": machine(), "tables": [asdict(table) for table in tables]}
    path.write_text(json.dumps(content, indent=1) + "\n")
