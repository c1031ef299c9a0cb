"""How everything here is measured: alternating runs in one process, and the peak memory of fresh processes."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
WIDTHS = "  {:<66} {:>9} {:>9} {:>7} {:<3} {:>7} {:>6} {:>7} {:>3} {}"
RUNS, MOST = 15, 4  # on a shared machine the least of nine still moves by a tenth


@dataclass
class Row:
    """One line of a table. ratio: in the table's unit; higher says which side of the target is good. limit: the best
    that is known to be possible, a bound or what a prototype reached. ours, peer: least seconds of `runs` runs."""

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


def alternate(
    calls: dict[str, Call],
    runs: int = RUNS,
    most: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds by `clock` of each call: after one round that does not count, `runs` rounds of all calls in turn, and up
    to `most` times as many until each call came within 3 % of its least three times. Long calls on a busy machine
    seldom meet a quiet moment, and a least that only one of two calls has met compares moments, not calls."""
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
    """Whether three runs came within 3 % of the least."""
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
    """min(name) / min(unit), or the other way round where higher is better."""
    over, under = (unit, name) if higher else (name, unit)
    medians = statistics.median(seconds[over]) / statistics.median(seconds[under])
    ours, peer = min(seconds[name]), min(seconds[unit])
    minima = peer / ours if higher else ours / peer
    return Row(what, minima, medians, target, higher, "x", limit, ours, peer, len(seconds[name]))


def fastest(
    seconds: dict[str, list[float]], name: str, what: str, target: float | None = None
) -> Row:
    """min(name) in seconds, for what has no counterpart to be compared with."""
    found = seconds[name]
    least, median = min(found), statistics.median(found)
    return Row(what, least, median, target, False, "s", ours=least, runs=len(found))


def extra_memory(
    module: str, name: str, what: str, target: float | None = None, limit: float | None = None
) -> Row:
    """MiB that `module.PEAK[name]()` adds to the peak of a fresh process that prepares but does not call it.

    The median of three processes each: a process's own peak varies by some MiB.
    """
    peaks = [
        statistics.median(_peak(module, name, call) for _ in range(3)) for call in (True, False)
    ]
    return Row(what, (peaks[0] - peaks[1]) / 1024, None, target, False, "MiB", limit, runs=3)


def _peak(module: str, name: str, call: bool) -> int:
    # Not getrusage, whose maximum a child inherits from its parent.
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
    """A file that can be written later, as an argument: minutes of measuring must not end without a place."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    return path


def machine() -> dict[str, object]:
    """What numbers were measured on."""
    return {
        "processor": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(tables: list[Table], path: Path) -> None:
    """Every number as JSON, with what it was measured on."""
    content = {"machine": machine(), "tables": [asdict(table) for table in tables]}
    path.write_text(json.dumps(content, indent=1) + "\n")
