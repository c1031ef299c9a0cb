"""A training step on a CPU: nearkin's beside a plain loop around the same timm model, and objectives beside `ce`."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bench import Row, Table, ratio, settled
from benchmarks.training_steps import Case, prepared, settings
from nearkin.device import Precision
from nearkin.distributed import Runtime
from nearkin.process import keep_freed_memory
from nearkin.training.autotune import NAMES, tune

BATCH, CLASSES, BANK = 64, 100, 8192
# Everything is built anew for each round: where its weights happen to lie in memory is worth some per cent, for as
# long as it lives.
ROUNDS, MOST = 8, 2  # at least; times as many at most, while not every least is settled
# Of every run. Those of a round take turns step by step, because the machine's speed drifts from one second to the
# next; and they are long, because the least of short ones is one of its rare quick moments.
SECONDS = 3.0
LARGE = (("resnet18", 64), ("vit_tiny_patch16_224", 64))
# Where the bank weighs more: model, side, share of ce's images per second.
SMALL = (("resnet10t", 32, 0.6), ("test_resnet", 32, 0.5))


class Setup(NamedTuple):
    case: Case
    runtime: Runtime
    threads: int


def setup(
    runtime: Runtime,
    model: str,
    side: int,
    objective: str,
    batch: int = BATCH,
    layout: str = "auto",
    threads: int | None = None,
) -> Setup:
    case = Case(model, side, batch, CLASSES, objective, BANK, memory_format=layout)
    return Setup(case, runtime, threads or torch.get_num_threads())


def measured(setups: dict[str, Setup]) -> dict[str, list[float]]:
    """Seconds of BATCH crops in each round."""
    found: dict[str, list[float]] = {name: [] for name in setups}
    threads = torch.get_num_threads()
    for number in range(MOST * ROUNDS):
        if number >= ROUNDS and all(map(settled, found.values())):
            break
        for name, seconds in one_round(setups).items():
            found[name].append(seconds)
        gc.collect()  # a stepper holds itself
    torch.set_num_threads(threads)
    return found


def one_round(setups: dict[str, Setup]) -> dict[str, float]:
    """Seconds of BATCH crops, by steps of new instances in turn for about SECONDS each."""
    steps, crops = {}, {}
    for name, given in setups.items():
        steps[name], views = prepared(given.case, given.runtime)
        crops[name] = views * given.case.batch
        steps[name]()  # the first takes longer
    passed = dict.fromkeys(setups, 0.0)
    turns = 0
    while sum(passed.values()) < SECONDS * len(setups):
        for name, step in steps.items():
            torch.set_num_threads(setups[name].threads)
            start = time.perf_counter()
            step()
            passed[name] += time.perf_counter() - start
        turns += 1
    return {name: passed[name] / turns * BATCH / crops[name] for name in setups}


def large(runtime: Runtime, model: str, side: int) -> list[Row]:
    """What reads an image once; then what sees it twice, beside `ce` on as many crops."""
    of = partial(setup, runtime, model, side)
    one = measured({name: of(name) for name in ("timm", "ce", "cone")})
    two = measured({"supcon": of("supcon"), "schane": of("schane"), "ce": of("ce", 2 * BATCH)})
    named = partial("{}, {} px: {}".format, model, side)
    return [
        ratio(one, "ce", "timm", named("ce against timm, fp32"), 0.97, True),
        ratio(one, "cone", "ce", named("cone against ce"), 0.70, True, 0.75),
        ratio(two, "supcon", "ce", named("supcon against ce per crop"), 0.95, True),
        ratio(two, "schane", "ce", named("schane against ce per crop"), 0.95, True),
    ]


def small(runtime: Runtime, model: str, side: int, target: float) -> Row:
    found = measured({name: setup(runtime, model, side, name) for name in ("ce", "cone")})
    return ratio(found, "cone", "ce", f"{model}, {side} px: cone against ce", target, True)


def half(model: str, side: int) -> Row:
    """`ce` against timm in bf16, where the processor multiplies in it: elsewhere a step takes many times as long."""
    what = f"{model}, {side} px: ce against timm, bf16"
    if not torch.cpu._is_avx512_bf16_supported():
        return Row(f"{what}: no avx512_bf16 here", float("nan"))
    with closing(Runtime(device="cpu", precision="bf16")) as runtime:
        found = measured({name: setup(runtime, model, side, name) for name in ("timm", "ce")})
        return ratio(found, "ce", "timm", what, 0.97, True)


def tuning(runtime: Runtime, model: str, side: int) -> Row:
    """What `--autotune` picks against timm's defaults with all threads."""
    plain = setup(runtime, model, side, "timm")
    config, network = settings(setup(runtime, model, side, "ce").case, runtime)
    choice = tune(config, frozenset(NAMES), network, 1, runtime).settings
    precision: Precision = "bf16" if choice.precision == "bf16" else "fp32"
    layout, threads = choice.memory_format, choice.threads
    picked = setup(runtime.at(precision), model, side, "ce", layout=layout, threads=threads)
    found = measured({"timm": plain, "tuned": picked})
    what = f"{model}, {side} px: tuned ({precision}, {layout}, {threads} thr.) against timm"
    return ratio(found, "tuned", "timm", what, 1.1, True, 1.35)


def table() -> Table:
    keep_freed_memory()  # as every run does, and good for the plain loop as well
    rows = []
    with closing(Runtime(device="cpu", precision="fp32")) as runtime:
        for model, side in LARGE:
            rows += large(runtime, model, side)
        rows += [small(runtime, *each) for each in SMALL]
        rows.append(tuning(runtime, SMALL[-1][0], LARGE[0][1]))
    rows += [half(model, side) for model, side in LARGE]
    setting = (
        f"seconds of {BATCH} crops, in runs of {SECONDS} s that take turns step by step; ratios of "
        f"images per second; {CLASSES} classes, bank of {BANK}, {torch.get_num_threads()} threads, "
        "no tuning but where it says so; forward, backward, SGD or AdamW"
    )
    return Table("Training steps", setting, rows)
