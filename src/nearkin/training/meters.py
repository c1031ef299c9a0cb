"""Sums of the losses, kept on the device; they come to the host once per interval."""

from __future__ import annotations

import torch
from torch import Tensor

from nearkin.types import Loss


class Meters:
    """Means of the loss and its terms since the last `take`. Saved with a checkpoint, so that a resumed interval
    reports what an uninterrupted one would."""

    def __init__(self, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=self._dtype, device=device)
        self._steps = 0

    def add(self, loss: Loss) -> None:
        """Count one step. Every step of an interval has the same terms."""
        values = torch.stack([loss.total.detach(), *loss.terms.values()]).to(self._dtype)
        if self._steps == 0:
            self._names = ["loss", *loss.terms]
            self._sums = torch.zeros_like(values)
        self._sums += values
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The means, and start again. The one transfer to the host."""
        means = (self._sums / max(1, self._steps)).tolist() if self._steps else []
        names, self._names, self._steps = self._names, [], 0
        return dict(zip(names, means, strict=True))

    def state(self) -> tuple[Tensor, dict[str, object]]:
        return self._sums, {"names": self._names, "steps": self._steps}

    def load(self, sums: Tensor, state: dict[str, object]) -> None:
        self._sums = sums.to(self._device)
        self._names = list(state["names"])  # type: ignore[call-overload]
        self._steps = int(state["steps"])  # type: ignore[call-overload]
