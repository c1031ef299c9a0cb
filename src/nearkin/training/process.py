"""What a run asks of its own process: threads, and memory that stays."""

from __future__ import annotations

import ctypes
import sys

import torch

# Of glibc's malloc.h; torch asks malloc for every tensor on a CPU.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def settle(threads: int) -> None:
    """Compute with `threads`, and keep freed memory for the next step.

    glibc maps large tensors one by one and gives them back when they are freed, so that every step pays for fresh
    pages again (methods: docs/performance.md). Elsewhere only the threads are set.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
