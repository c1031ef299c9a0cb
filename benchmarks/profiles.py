"""Profiles of the losses beside plain implementations: `python -m benchmarks.profiles`."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bank, pairwise
from benchmarks.bench import Call

SHOWN, CALLS = 8, 3


def pairs() -> dict[str, Call]:
    loss, given = pairwise.LOSSES["SupCon (out)"], pairwise.batch(pairwise.SAMPLES)
    return {
        "SupCon from N x N matrices": partial(pairwise.plain, loss, *given),
        "SupCon in tiles": partial(pairwise.step, loss, *given),
    }


def banks() -> dict[str, Call]:
    given, theirs = bank.given(), bank.published()
    return {
        "CoNe's bank, published structure": partial(theirs.step, given),
        "CoNe's bank, ours, stored in bf16": partial(bank.ours, bank.filled(torch.bfloat16), given),
    }


def table(name: str, call: Call) -> str:
    """The operations with the largest self time."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(CALLS):
            call()
    events = sorted(run.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"\n{name}: {total / CALLS / 1000:.0f} ms of operations"]
    for event in events[:SHOWN]:
        share = event.self_cpu_time_total / total
        lines.append(f"  {share:>6.1%}  {event.count // CALLS:>6} x  {event.key}")
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(2)
    for name, call in (pairs() | banks()).items():
        print(table(name, call), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
