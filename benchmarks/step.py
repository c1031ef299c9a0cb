"""A training step on a CPU: nearkin's beside a plain loop around the same timm model, and objectives beside `ce`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench import Call, Row, Table, alternate, ratio
from benchmarks.training_steps import Case, prepared, settings
from nearkin.config import RunConfig
from nearkin.runtime import Precision, Runtime
from nearkin.training.autotune import NAMES, tuned
from nearkin.training.process import settle

BATCH, CLASSES, BANK = 64, 100, 8192
RUNS, MOST = 15, 2  # targets lie as close as 3 % to what is measured
COPIES = 2  # of everything: where weights happen to lie in memory is worth some per cent
LARGE = (("resnet18", 64), ("vit_tiny_patch16_224", 64))
# Where the bank weighs more: model, side, share of ce's images per second.
SMALL = (("resnet10t", 32, 0.6), ("test_resnet", 32, 0.5))


def case(model: str, side: int, objective: str, batch: int = BATCH) -> Case:
    return Case(model, side, batch, CLASSES, objective, BANK)


def calls(runtime: Runtime, model: str, side: int) -> dict[str, Call]:
    """The plain loop; `ce`; the rivals, which see every image twice, and `ce` on as many crops."""
    cases = {n: case(model, side, n) for n in ("timm", "ce", "cone", "supcon", "schane")}
    cases["ce on twice the images"] = case(model, side, "ce", 2 * BATCH)
    return {
        f"{name}, {copy}": prepared(each, runtime)[0]
        for copy in range(COPIES)
        for name, each in cases.items()
    }


def large(runtime: Runtime, model: str, side: int) -> list[Row]:
    single = alternate(calls(runtime, model, side), RUNS, MOST)
    seconds: dict[str, list[float]] = {}
    for name, times in single.items():
        seconds.setdefault(name.split(", ")[0], []).extend(times)
    named = partial("{}, {} px: {}".format, model, side)
    twice = "ce on twice the images"
    return [
        ratio(seconds, "ce", "timm", named("ce against timm, fp32"), 0.97, True),
        ratio(seconds, "cone", "ce", named("cone against ce"), 0.70, True, 0.75),
        ratio(seconds, "supcon", twice, named("supcon against ce per crop"), 0.95, True),
        ratio(seconds, "schane", twice, named("schane against ce per crop"), 0.95, True),
    ]


def small(runtime: Runtime, model: str, side: int, target: float) -> Row:
    steps = {n: prepared(case(model, side, n), runtime)[0] for n in ("ce", "cone")}
    return ratio(
        alternate(steps, RUNS, MOST),
        "cone",
        "ce",
        f"{model}, {side} px: cone against ce",
        target,
        True,
    )


def half(model: str, side: int) -> Row:
    """`ce` against timm in bf16, where the processor multiplies in it: elsewhere a step takes many times as long."""
    what = f"{model}, {side} px: ce against timm, bf16"
    if not torch.cpu._is_avx512_bf16_supported():
        return Row(f"{what}: no avx512_bf16 here", float("nan"))
    with closing(Runtime(device="cpu", precision="bf16")) as runtime:
        steps = {n: prepared(case(model, side, n), runtime)[0] for n in ("timm", "ce")}
        return ratio(alternate(steps, RUNS, MOST), "ce", "timm", what, 0.97, True)


def tuning(runtime: Runtime, model: str, side: int) -> Row:
    """What `--autotune` picks against timm's defaults with all threads."""
    given = case(model, side, "ce")
    plain, _ = prepared(replace(given, objective="timm"), runtime)
    threads = torch.get_num_threads()
    config, network = settings(given, runtime)
    choice: RunConfig = tuned(config, frozenset(NAMES), network, 1, runtime).config
    precision: Precision = "bf16" if choice.precision == "bf16" else "fp32"
    layout, ours = choice.memory_format, runtime.at(precision)
    step, _ = prepared(replace(given, memory_format=layout), ours)

    def with_threads(call: Call, count: int) -> None:
        torch.set_num_threads(count)
        call()

    seconds = alternate(
        {
            "timm": partial(with_threads, plain, threads),
            "tuned": partial(with_threads, step, int(choice.threads)),
        },
        RUNS,
        MOST,
    )
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
        f"{BATCH} images a step, {CLASSES} classes, images per second, bank of {BANK}, {torch.get_num_threads()} "
        "threads, no tuning but where it says so; forward, backward, SGD or AdamW"
    )
    return Table("Training steps", setting, rows)
