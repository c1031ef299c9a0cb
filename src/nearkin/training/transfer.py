"""Batches onto the device."""

from __future__ import annotations

import torch

from nearkin.types import Batch


class Transfer:
    """On a GPU the copy travels on a stream of its own, so that it overlaps with the step before, which still runs.

    It does not wait for the host when the batch lies in pinned memory, as the loader leaves it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return self._moved(batch)
        with torch.cuda.stream(self._stream):
            moved = self._moved(batch)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        for each in moved:
            each.record_stream(
                compute
            )  # else its memory could be given away before the step has read it
        return moved

    def _moved(self, batch: Batch) -> Batch:
        return Batch(*(each.to(self._device, non_blocking=True) for each in batch))
