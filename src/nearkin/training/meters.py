"""Sums of the losses, kept on the device; they come to the host once per interval and once per epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from nearkin.types import Loss

WINDOWS = ("interval", "epoch")


class _Window:
    """Sums over a stretch of steps, all of which have the same names."""

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=self.dtype, device=device)
        self.steps = 0

    def add(self, names: list[str], values: Tensor) -> None:
        if self.steps == 0:
            self.names, self.sums = names, torch.zeros_like(values)
        self.sums += values
        self.steps += 1

    def take(self) -> tuple[dict[str, float], int]:
        """The sums and the number of steps, and start again. A transfer to the host."""
        sums, steps = dict(zip(self.names, self.sums.tolist(), strict=True)), self.steps
        self.names, self.sums, self.steps = [], self.sums[:0], 0
        return sums, steps


class Meters:
    """The loss, its terms and its counts since the last `take` and since the last `take_epoch`.

    Saved with a checkpoint, so that a resumed stretch reports what an uninterrupted one would.
    """

    def __init__(self, device: torch.device) -> None:
        self._windows = {name: _Window(device) for name in WINDOWS}
        self._counts: tuple[str, ...] = ()

    def add(self, loss: Loss) -> None:
        """Count one step."""
        named = {"loss": loss.total.detach(), **loss.terms, **loss.counts}
        self._counts = tuple(loss.counts)
        window = self._windows["interval"]
        values = torch.stack([value.to(window.dtype) for value in named.values()])
        for window in self._windows.values():
            window.add(list(named), values)

    def take(self) -> dict[str, float]:
        """The means of loss and terms over the interval."""
        means, _ = self._take("interval")
        return means

    def take_epoch(self) -> tuple[dict[str, float], dict[str, int]]:
        """The means of loss and terms, and the sums of the counts, over the epoch."""
        return self._take("epoch")

    def _take(self, window: str) -> tuple[dict[str, float], dict[str, int]]:
        sums, steps = self._windows[window].take()
        means = {n: value / steps for n, value in sums.items() if n not in self._counts}
        return means, {n: round(value) for n, value in sums.items() if n in self._counts}

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and plain values, to be saved."""
        plain = {name: {"names": w.names, "steps": w.steps} for name, w in self._windows.items()}
        return {n: w.sums for n, w in self._windows.items()}, {"counts": self._counts, **plain}

    def load(self, sums: dict[str, Tensor], state: dict[str, object]) -> None:
        """What `state` gave."""
        self._counts = tuple(state["counts"])  # type: ignore[arg-type]
        for name, window in self._windows.items():
            plain = state[name]
            window.sums = sums[name].to(window.device)
            window.names = list(plain["names"])  # type: ignore[index]
            window.steps = int(plain["steps"])  # type: ignore[index]
