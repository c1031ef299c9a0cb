"""Randomness that belongs to a purpose and some numbers, never to a worker, a rank or a moment."""

from __future__ import annotations

import struct
from hashlib import blake2b

import numpy as np


def keyed_seed(purpose: str, *numbers: int) -> int:
    """A well-mixed seed in [0, 2^63): BLAKE2b of the purpose and the numbers (each within 64 signed bits).

    Pure, and the same on every machine. Source: our choice.
    """
    message = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1


def keyed_rng(purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator (PCG-64) seeded with `keyed_seed(purpose, *numbers)`."""
    return np.random.Generator(np.random.PCG64(keyed_seed(purpose, *numbers)))
