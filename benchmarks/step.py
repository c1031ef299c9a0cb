"""A training step on a CPU: nearkin's beside a plain loop around the same timm model, and objectives beside `ce`."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bench import Call, Row, Table, alternate, ratio
from benchmarks.training_steps import Case, prepared, settings
from nearkin.config import RunConfig
from nearkin.runtime import Precision, Runtime
from nearkin.training.autotune import NAMES, tuned
from nearkin.training.process import settle

BATCH, CLASSES, BANK = 64, 100, 8192
RUNS = 8  # of each copy
# Of every run, as many steps as fit. Of short runs the least is one of the machine's rare quick moments, which not
# every call meets: the ratio of the minima of `ce` and `cone`, resampled from 31 runs of 0.4, 2.5 and 5 seconds each,
# had a standard deviation of 0.018, 0.023 and 0.009. And the shorter of two calls meets them more often.
SECONDS = 5.0
COPIES = 2  # of everything: where weights happen to lie in memory is worth some per cent
LARGE = (("resnet18", 64), ("vit_tiny_patch16_224", 64))
# Where the bank weighs more: model, side, share of ce's images per second.
SMALL = (("resnet10t", 32, 0.6), ("test_resnet", 32, 0.5))


class Run(NamedTuple):
    """Some steps. batches: of BATCH crops that they see."""

    call: Call
    batches: float


def run(given: Case, runtime: Runtime) -> Run:
    """Steps for about SECONDS."""
    step, views = prepared(given, runtime)
    step()  # the first takes longer
    start = time.perf_counter()
    step()
    count = max(1, round(SECONDS / (time.perf_counter() - start)))

    def steps() -> None:
        for _ in range(count):
            step()

    return Run(steps, count * views * given.batch / BATCH)


def case(model: str, side: int, objective: str, batch: int = BATCH) -> Case:
    return Case(model, side, batch, CLASSES, objective, BANK)


def batch_seconds(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Of BATCH crops, in runs that alternate."""
    found = alternate({name: each.call for name, each in runs.items()}, RUNS)
    return {name: [s / runs[name].batches for s in seconds] for name, seconds in found.items()}


def measured(runtime: Runtime, cases: dict[str, Case]) -> dict[str, list[float]]:
    """Seconds of each case, from some instances of everything."""
    runs = {
        f"{name}, {copy}": run(each, runtime)
        for copy in range(COPIES)
        for name, each in cases.items()
    }
    found = batch_seconds(runs)
    return {n: [s for copy in range(COPIES) for s in found[f"{n}, {copy}"]] for n in cases}


def large(runtime: Runtime, model: str, side: int) -> list[Row]:
    """What reads an image once; then what sees it twice, beside `ce` on as many crops."""
    once = {name: case(model, side, name) for name in ("timm", "ce", "cone")}
    twice = {name: case(model, side, name) for name in ("supcon", "schane")}
    twice["ce"] = case(model, side, "ce", 2 * BATCH)
    one, two = measured(runtime, once), measured(runtime, twice)
    named = partial("{}, {} px: {}".format, model, side)
    return [
        ratio(one, "ce", "timm", named("ce against timm, fp32"), 0.97, True),
        ratio(one, "cone", "ce", named("cone against ce"), 0.70, True, 0.75),
        ratio(two, "supcon", "ce", named("supcon against ce per crop"), 0.95, True),
        ratio(two, "schane", "ce", named("schane against ce per crop"), 0.95, True),
    ]


def small(runtime: Runtime, model: str, side: int, target: float) -> Row:
    found = measured(runtime, {n: case(model, side, n) for n in ("ce", "cone")})
    return ratio(found, "cone", "ce", f"{model}, {side} px: cone against ce", target, True)


def half(model: str, side: int) -> Row:
    """`ce` against timm in bf16, where the processor multiplies in it: elsewhere a step takes many times as long."""
    what = f"{model}, {side} px: ce against timm, bf16"
    if not torch.cpu._is_avx512_bf16_supported():
        return Row(f"{what}: no avx512_bf16 here", float("nan"))
    with closing(Runtime(device="cpu", precision="bf16")) as runtime:
        found = measured(runtime, {n: case(model, side, n) for n in ("timm", "ce")})
        return ratio(found, "ce", "timm", what, 0.97, True)


def tuning(runtime: Runtime, model: str, side: int) -> Row:
    """What `--autotune` picks against timm's defaults with all threads."""
    given = case(model, side, "ce")
    plain = run(replace(given, objective="timm"), runtime)
    threads = torch.get_num_threads()
    config, network = settings(given, runtime)
    choice: RunConfig = tuned(config, frozenset(NAMES), network, 1, runtime).config
    precision: Precision = "bf16" if choice.precision == "bf16" else "fp32"
    layout, ours = choice.memory_format, runtime.at(precision)
    picked = run(replace(given, memory_format=layout), ours)

    def with_threads(given: Run, count: int) -> Run:
        def call() -> None:
            torch.set_num_threads(count)
            given.call()

        return Run(call, given.batches)

    runs = {
        "timm": with_threads(plain, threads),
        "tuned": with_threads(picked, int(choice.threads)),
    }
    seconds = batch_seconds(runs)
    torch.set_num_threads(threads)
    what = f"{model}, {side} px: tuned ({precision}, {layout}, {choice.threads} thr.) against timm"
    return ratio(seconds, "tuned", "timm", what, 1.1, True, 1.35)


def table() -> Table:
    settle(torch.get_num_threads())  # as every run does, and good for the plain loop as well
    rows = []
    with closing(Runtime(device="cpu", precision="fp32")) as runtime:
        for model, side in LARGE:
            rows += large(runtime, model, side)
        rows += [small(runtime, *each) for each in SMALL]
        rows.append(tuning(runtime, SMALL[-1][0], LARGE[0][1]))
    rows += [half(model, side) for model, side in LARGE]
    setting = (
        f"seconds of {BATCH} crops, in runs of {SECONDS} s; ratios of images per second; {CLASSES} classes, bank of "
        f"{BANK}, {torch.get_num_threads()} threads, no tuning but where it says so; forward, backward, SGD or AdamW"
    )
    return Table("Training steps", setting, rows)
