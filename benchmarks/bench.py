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
RUNS = 9


@dataclass
class Row:
    """One line of a table. ratio: in the table's unit; higher says which side of the target is good."""

    what: str
    ratio: float
    median: float | None = None
    target: float | None = None
    higher: bool = False
    unit: str = ""

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
        lines = [f"\n{self.title}", f"  {self.setting}"]
        for row in self.rows:
            median = "" if row.median is None else f"(medians {row.median:.2f})"
            target = (
                ""
                if row.target is None
                else f"target {'>=' if row.higher else '<='} {row.target:g}"
            )
            verdict = "" if row.target is None else ("MISSED" if row.missed else "ok")
            lines.append(
                f"  {row.what:<58} {row.ratio:>8.2f} {row.unit:<9} {median:<16} {target:<15} {verdict}"
            )
        return "\n".join(lines)


def alternate(calls: dict[str, Call], runs: int = RUNS) -> dict[str, list[float]]:
    """Seconds of each call, `runs` times, one call after the other, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(
    seconds: dict[str, list[float]],
    name: str,
    unit: str,
    what: str,
    target: float | None = None,
    higher: bool = False,
) -> Row:
    """min(name) / min(unit), or the other way round where higher is better."""
    over, under = (unit, name) if higher else (name, unit)
    medians = statistics.median(seconds[over]) / statistics.median(seconds[under])
    minima = min(seconds[over]) / min(seconds[under])
    return Row(what, minima, medians, target, higher, "x")


def fastest(
    seconds: dict[str, list[float]], name: str, what: str, target: float | None = None
) -> Row:
    """min(name) in seconds, for what has no counterpart to be compared with."""
    found = seconds[name]
    return Row(what, min(found), statistics.median(found), target, False, "s")


def extra_memory(module: str, name: str, what: str, target: float | None = None) -> Row:
    """MiB that `module.PEAK[name]()` adds to the peak of a fresh process that prepares but does not call it.

    The median of three processes each: a process's own peak varies by some MiB.
    """
    peaks = [
        statistics.median(_peak(module, name, call) for _ in range(3)) for call in (True, False)
    ]
    return Row(what, (peaks[0] - peaks[1]) / 1024, None, target, False, "MiB")


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
