"""Ranks tell each other to stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nearkin.runtime import Runtime


class Flags:
    """What any rank may ask of all: read one step later, so that no step waits for it.

    On a GPU the flags travel on a stream of their own: reading those of the last step does not wait for this one.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._alone = runtime.world_size == 1
        self._device = runtime.device
        self._stream = torch.cuda.Stream() if runtime.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._sent: tuple[Tensor, Any] | None = None

    def post(self, stop: bool, bad: Tensor) -> None:
        """Send this rank's wish to stop and whether its loss is not finite (`[]` bool, on the device)."""
        wish = torch.full((), stop, dtype=torch.bool, device=self._device)
        flags = torch.stack([wish, bad]).to(torch.int32)
        if self._stream is not None:
            self._sent = self._to_host(flags, self._stream)
        elif self._alone:
            self._sent = flags, None
        else:
            self._sent = flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)

    def read(self) -> tuple[bool, bool]:
        """(stop, bad) of the last post, over all ranks; (False, False) before the first."""
        if self._sent is None:
            return False, False
        flags, arrival = self._sent
        if isinstance(arrival, torch.cuda.Event):
            arrival.synchronize()
        elif arrival is not None:
            arrival.wait()
        self._sent = None
        stop, bad = flags.tolist()
        return bool(stop), bool(bad)

    def _to_host(self, flags: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            flags.record_stream(stream)
            if not self._alone:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            host = torch.empty(2, dtype=torch.int32, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(stream)
        return host, arrival
