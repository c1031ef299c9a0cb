"""NeighbourBank: the memory of teacher keys of CoNe, GPaCo and Attract-and-Repulse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from nearkin.functional import SoftPairs, soft_pairs
from nearkin.functional._bank_attention import Memory, own_copy_mask

EMPTY = -1


class NeighbourBank(nn.Module):
    """First in, first out memory of `size` entries: key, labels, class probabilities and sample ids.

    All state is in buffers, pointer and fill included, so that a checkpoint restores it exactly. An empty slot has
    label -1 and is never usable. The bank is not part of the network, so DDP sends nothing of it.

    storage: the type of keys and probabilities. A cast of the module to float64 casts them; other casts do not,
    because the precision of a run does not determine that of its bank.

    keys `[K, d]`; labels, weights, ids `[K, 2]` (a mixed image has two of each; else the second has weight 0 and
    id -1); probabilities `[C, K]`, the layout in which the consistency target reads them.
    """

    keys: Tensor
    labels: Tensor
    weights: Tensor
    ids: Tensor
    probabilities: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self, size: int, dim: int, classes: int = 0, storage: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.storage = storage
        self.register_buffer("keys", torch.zeros(size, dim, dtype=storage))
        self.register_buffer("labels", torch.full((size, 2), EMPTY, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(size, 2))
        self.register_buffer("ids", torch.full((size, 2), EMPTY, dtype=torch.int64))
        self.register_buffer("probabilities", torch.zeros(classes, size, dtype=storage))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return self.keys.shape[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("keys", "probabilities"):
            stored = self.get_buffer(name)
            if stored.dtype not in (self.storage, torch.float64):
                setattr(self, name, stored.to(self.storage))
        return self

    @property
    def memory(self) -> Memory:
        """All entries, for `bank_attention`."""
        return Memory(self.keys, self.labels, self.weights, self.ids, self.probabilities)

    @property
    def pairs(self) -> SoftPairs:
        """The labels of all entries, as two classes with weights each."""
        return SoftPairs(self.labels, self.weights)

    @torch.no_grad()
    def write(
        self, keys: Tensor, labels: Tensor, probabilities: Tensor | None, ids: Tensor
    ) -> None:
        """Replace the oldest entries. Any number of rows; of more than K only the last K remain.

        keys `[B, d]` of unit length; labels `[B]` or `[B, C]`; probabilities `[B, C]`, or None in a bank made
        for 0 classes; ids `[B]` or `[B, 2]`.
        """
        if probabilities is None and len(self.probabilities) > 0:
            raise ValueError("This bank keeps class probabilities; give them.")
        size = len(self)
        rows = slice(max(0, keys.shape[0] - size), None)
        pairs = soft_pairs(labels[rows], validate=False)
        count = pairs.labels.shape[0]
        at = (self.pointer + torch.arange(count, device=self.keys.device)) % size
        self.keys[at] = keys[rows].detach().to(self.keys.dtype)
        self.labels[at] = pairs.labels.to(self.labels.dtype)
        self.weights[at] = pairs.weights.to(self.weights.dtype)
        own = (ids[rows] if ids.dim() == 2 else ids[rows, None]).to(self.ids.dtype)
        self.ids[at] = nn.functional.pad(own, (0, 2 - own.shape[1]), value=EMPTY)
        if probabilities is not None:
            self.probabilities[:, at] = probabilities[rows].detach().T.to(self.probabilities.dtype)
        self.pointer.copy_((self.pointer + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))

    @contextmanager
    def collapsed(self) -> Iterator[None]:
        """Inside, every key is the same unit vector, the direction of (1, ..., 1)."""
        keys = self.keys
        self.keys = torch.full_like(keys[:1], keys.shape[1] ** -0.5).expand_as(keys)
        try:
            yield
        finally:
            self.keys = keys

    def usable(self, ids: Tensor) -> Tensor:
        """`[B, K]`: True where an entry is filled and shares no sample id with the anchor (`ids` `[B]` or `[B, 2]`)."""
        index, table = own_copy_mask(ids, self.labels, self.ids, torch.float32)
        return (embedding_bag(index, table, mode="sum") == 0).T
