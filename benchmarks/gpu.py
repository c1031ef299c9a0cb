"""Training steps and loss kernels on a GPU: `python -m benchmarks.gpu --json FILE`. Times in milliseconds.

Steps of nearkin's Stepper on synthetic images on the device, without data loading.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import bank, pairwise
from benchmarks.bench import Call, Row, Table, alternate, machine, output
from benchmarks.training_steps import Case, prepared
from nearkin.device import Precision
from nearkin.distributed import Runtime

Record = dict[str, Any]
LAYOUT = "channels_last"  # also of the plain loop
OBJECTIVES = ("timm", "ce", "supcon", "schane", "cone")
LOSSES = ("SupCon (out)", "SCHaNe, hardness 1", "SINCERE")


@dataclass(frozen=True)
class Sizes:
    """models: name and image side. steps: of one run, without synchronisation between. runs: measured runs.
    backend: of the compiled steps; None leaves them out."""

    models: tuple[tuple[str, int], ...] = (("resnet50", 224), ("vit_base_patch16_224", 224))
    batch: int = 128
    classes: int = 1000
    bank: int = 65_536
    anchors: int = 16_384
    steps: int = 3
    runs: int = 9
    precision: Precision = "bf16"
    backend: str | None = "inductor"


# `eager` traces as inductor does but needs no compiler; bf16 is slow on most CPUs.
TINY = Sizes((("test_resnet", 16), ("test_vit", 32)), 4, 10, 64, 128, 1, 2, "fp32", "eager")


def wait(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device, runs: int, steps: int = 1) -> Record:
    """Seconds of one call, from runs of `steps` calls each, and the device's peak memory in MiB."""

    def run() -> None:
        for _ in range(steps):
            call()
        wait(device)

    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [each / steps for each in alternate({"call": run}, runs)["call"]]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    numbers = {"minimum": min(seconds), "median": statistics.median(seconds), "n": runs}
    return numbers | {"peak_mib": peak}


def attempt(about: Record, work: Callable[[], Record]) -> Record:
    """`about` with the result of `work`, or with the reason of its failure; memory is freed afterwards."""
    try:
        return about | work()
    except Exception as error:  # out of memory, or any compiler error
        first = next(iter(str(error).strip().splitlines()), "")
        return about | {"failed": f"{type(error).__name__}: {first}"[:300]}
    finally:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def step_times(case: Case, runtime: Runtime, sizes: Sizes) -> Record:
    """One case. start: seconds of the first two steps minus those of two later ones, mostly compilation."""
    step, views = prepared(case, runtime)
    wait(runtime.device)
    start = time.perf_counter()
    for _ in range(2):
        step()
    wait(runtime.device)
    first = time.perf_counter() - start
    numbers = timed(step, runtime.device, sizes.runs, sizes.steps)
    return numbers | {"views": views, "start": max(0.0, first - 2 * numbers["minimum"])}


def pays_after(eager: Record, compiled: Record) -> float | None:
    """Steps after which compilation pays; None when it saves nothing or one of the two was not measured."""
    if "failed" in eager or "failed" in compiled or compiled["minimum"] >= eager["minimum"]:
        return None
    cost = max(0.0, compiled["start"] - eager["start"])
    return float(cost / (eager["minimum"] - compiled["minimum"]))


@contextmanager
def cold() -> Iterator[None]:
    """Disable the compiler's disk caches, so that compilation time is measured in full."""
    caches = torch.compiler.config.patch(force_disable_caches=True)  # type: ignore[attr-defined]
    with caches, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def steps(runtime: Runtime, sizes: Sizes, model: str, side: int) -> list[Record]:
    """Every objective and the plain loop, with and without compilation."""
    records = []
    for objective in OBJECTIVES:
        case = Case(model, side, sizes.batch, sizes.classes, objective, sizes.bank, None, LAYOUT)
        pair = []
        for backend in dict.fromkeys((None, sizes.backend)):
            compiled, chosen = backend is not None, replace(case, backend=backend)
            about = {"model": model, "objective": objective, "compiled": compiled}
            pair.append(attempt(about, partial(step_times, chosen, runtime, sizes)))
        if sizes.backend is not None:
            pair[1]["pays_after_steps"] = pays_after(*pair)
        records += pair
    return records


def loss_calls(device: torch.device, sizes: Sizes) -> dict[str, Callable[[], Call]]:
    """Name -> function that prepares the call. Inputs in bf16, except for the peer, which would also sum in bf16."""
    # Sets the module's sizes; its own table is not used here.
    bank.ENTRIES, bank.CLASSES, bank.TOPK = sizes.bank, sizes.classes, min(512, sizes.bank // 4)
    features, labels = (each.to(device) for each in pairwise.batch(sizes.anchors))
    half = features.bfloat16()
    supcon = pairwise.LOSSES[LOSSES[0]]
    calls: dict[str, Callable[[], Call]] = {
        name: partial(partial, pairwise.step, pairwise.LOSSES[name], half, labels)
        for name in LOSSES
    }
    calls["SupCon (out) from N x N matrices"] = lambda: partial(
        pairwise.plain, supcon, half, labels
    )
    calls["SupCon of pytorch-metric-learning"] = lambda: _peer(features, labels)
    for name, storage in (("bf16", torch.bfloat16), ("exact", torch.float32)):
        calls[f"CoNe's bank, {name}"] = partial(_bank, device, storage)
    calls["CoNe's bank, published structure"] = lambda: _published(device)
    return calls


def _peer(features: torch.Tensor, labels: torch.Tensor) -> Call:
    call = pairwise.peer(features, labels)
    if call is None:
        raise ModuleNotFoundError("not installed (--group bench)")
    return call


def _given(device: torch.device) -> bank.Given:
    return bank.Given(*(each.to(device) for each in bank.given()))


def _bank(device: torch.device, storage: torch.dtype) -> Call:
    return partial(bank.ours, bank.filled(storage).to(device), _given(device))


def _published(device: torch.device) -> Call:
    theirs = bank.Published(*(each.to(device) for each in bank.published()))
    return partial(theirs.step, _given(device))


def losses(device: torch.device, sizes: Sizes) -> list[Record]:
    """Forward and backward of each loss alone; the bank with its update."""
    with tensor_cores():
        return [
            attempt({"loss": name}, lambda make=make: timed(make(), device, sizes.runs))  # type: ignore[misc]
            for name, make in loss_calls(device, sizes).items()
        ]


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Allow TF32 for float32 products, ours and the peers': bf16 values are exact in it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def table(title: str, setting: str, records: list[Record]) -> Table:
    """One row per record, in milliseconds."""
    return Table(title, setting, [_row(record) for record in records])


def _row(record: Record) -> Row:
    what = record.get("loss") or record["objective"] + (", compiled" if record["compiled"] else "")
    if "failed" in record:
        return Row(f"{what}: {record['failed']}", float("nan"))
    if record["peak_mib"] is not None:
        what += f", {record['peak_mib'] / 1024:.2f} GiB"
    if record.get("pays_after_steps") is not None:
        what += f", pays after {record['pays_after_steps']:.0f} steps"
    return Row(what, 1000 * record["minimum"], 1000 * record["median"], unit="ms")


def about(device: torch.device, sizes: Sizes) -> Record:
    """Device, machine and settings."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    settings = asdict(sizes) | {
        "float32_products": "highest in steps, high for the losses alone",
        "bank_alone": {"batch": bank.BATCH, "dim": bank.DIM},
    }
    return {"device": name, "cuda": torch.version.cuda, "machine": machine(), "settings": settings}


def measure(runtime: Runtime, sizes: Sizes, path: Path) -> None:
    """All tables; the file is written after each, so that finished measurements are kept."""
    content = about(runtime.device, sizes) | {"steps": [], "losses": []}
    for model, side in sizes.models:
        found = steps(runtime, sizes, model, side)
        views = "supcon, schane: two views"
        setting = f"{side} pixels, {sizes.batch} images a step ({views}), {sizes.precision}"
        content["steps"] += found
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(table(f"Training steps, {model}", setting, found).show(), flush=True)
    content["losses"] = losses(runtime.device, sizes)
    path.write_text(json.dumps(content, indent=1) + "\n")
    setting = (
        f"{sizes.anchors} x {pairwise.DIM}, bf16 inputs, sums in float32; forward + backward; "
        f"bank: {sizes.bank} entries, {sizes.classes} classes, with its update"
    )
    print(table("Losses alone", setting, content["losses"]).show(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=output, required=True, help="write the numbers here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    parser.add_argument(
        "--eager", action="store_true", help="leave out compiled steps, which take minutes"
    )
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here; give --device cpu --tiny to try it.", file=sys.stderr)
        return 2
    sizes = TINY if given.tiny else Sizes()
    if given.eager:
        sizes = replace(sizes, backend=None)
    runtime = Runtime(device=given.device, precision=sizes.precision)
    with closing(runtime), cold():
        measure(runtime, sizes, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
