"""`--autotune`: choose precision, memory format and threads by a short timed trial instead of by rule."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nearkin.device import choose_precision
from nearkin.distributed import Runtime
from nearkin.network import Network
from nearkin.process import cores
from nearkin.settings import Settings

NAMES = ("precision", "memory_format", "threads")
ROUNDS = 3  # timed steps of each choice, in turn; the fastest counts
ENOUGH = 0.95  # a setting changes where the trial takes less than this share of the time
HOPELESS = 2.0  # a choice that takes so many times the best in its first step is not tried again
PATIENCE = 90.0  # seconds; after them no further option is tried


class Choice(NamedTuple):
    """The settings of one trial."""

    precision: str
    memory_format: Literal["contiguous", "channels_last"]
    threads: int

    def __str__(self) -> str:
        return f"{self.precision} {self.memory_format} {self.threads} thread(s)"


class Tuned(NamedTuple):
    """The settings with the fastest choice, and the seconds of each choice in the order of the trials."""

    settings: Settings
    seconds: dict[Choice, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{choice} {1000 * s:.0f} ms" for choice, s in self.seconds.items())
        chosen = Choice(*(getattr(self.settings, name) for name in NAMES))
        return f"autotune: {chosen} chosen of {tried}"


def tune(
    settings: Settings, automatic: frozenset[str], network: Network, views: int, runtime: Runtime
) -> Tuned:
    """Try the settings of NAMES that are in `automatic`, one after the other, on copies of `network`.

    The batch has this process's share of the images, with random pixels. A trial is a forward and a backward pass of
    the whole network. The rule's choice stays unless another takes less than ENOUGH of its time. All processes use the
    choice of the first one. The global random state does not change.
    """
    best = Choice(*(getattr(settings, name) for name in NAMES))
    seconds: dict[Choice, float] = {}
    images = _images(settings, runtime, views)
    started = time.monotonic()
    with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
        for name in NAMES:
            others = [o for o in _others(name, best, runtime) if name in automatic]
            if others and time.monotonic() - started < PATIENCE:
                best = _fastest(best, others, network, images, seconds)
    best = runtime.share(best)
    return Tuned(settings.model_copy(update=best._asdict()), seconds)


def _others(name: str, best: Choice, runtime: Runtime) -> Iterator[Choice]:
    """The other values that the setting could have."""
    device = runtime.device.type
    half = choose_precision("auto", device) if device == "cuda" else "bf16"
    values: dict[str, list[Any]] = {
        "precision": [] if device == "mps" else ["fp32", half],
        "memory_format": ["contiguous", "channels_last"],
        "threads": sorted({1, max(1, cores() // 2), cores()}) if device == "cpu" else [],
    }
    for value in values[name]:
        if value != getattr(best, name):
            yield best._replace(**{name: value})


def _fastest(
    best: Choice,
    others: list[Choice],
    network: Network,
    images: Tensor,
    seconds: dict[Choice, float],
) -> Choice:
    """The fastest of all, timed in turn, so that a busy moment of the machine slows all of them."""
    copies = {choice: deepcopy(network).to(images.device) for choice in (best, *others)}
    first = {choice: timed(choice, copy, images) for choice, copy in copies.items()}
    kept = [c for c in copies if first[c] <= HOPELESS * min(first.values()) or c == best]
    rounds = [{c: timed(c, copies[c], images) for c in kept} for _ in range(ROUNDS)]
    found = first | {choice: min(each[choice] for each in rounds) for choice in kept}
    seconds |= found
    fastest = min(kept, key=found.__getitem__)
    return fastest if found[fastest] < ENOUGH * found[best] else best


def timed(choice: Choice, network: Network, images: Tensor) -> float:
    """The seconds of one forward and backward pass. Changes `network`."""
    network.train()
    network.set_memory_format(choice.memory_format)
    network.key.set(0, 0, 0, 1)
    torch.set_num_threads(choice.threads)
    device = images.device
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice.precision)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
        outputs = network(images)
    means = [output.float().square().mean() for output in outputs if output is not None]
    torch.autograd.backward(torch.stack(means).sum())
    network.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _images(config: Settings, runtime: Runtime, views: int) -> Tensor:
    rows = config.batch_size // (runtime.world_size * config.accumulate)
    shape = (max(2, views * rows), config.channels, *[config.image_size] * 2)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=draw).to(runtime.device)
