"""The pairs of a batch one tile after another: only the lower triangle, for the matrix of similarities is symmetric."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from nearkin.functional.labels import Labels, shared_classes
from nearkin.functional.terms import Over

HEIGHT = 2048  # most rows of a tile: it and its exponentials stay in the cache
WIDTH = 256  # its columns; products of wide tiles take up to half as long again in some processes, of tall ones never
KEPT = 2**22  # values that the backward pass finds again: 16 MiB


class Tile:
    """The samples `rows` with the samples `cols`, none of which comes after the rows.

    values: s_ij, or e^(s_ij) if `exponential`, `[rows, cols]`, 0 for a sample with itself. own: how many of the rows,
    the first, are the columns themselves, so that each of their pairs stands there twice: all or none. near: how many
    of the rows, the first, may share a class with a column; labels: theirs, and the columns'.
    """

    def __init__(
        self,
        buffers: Buffers,
        rows: slice,
        cols: slice,
        values: Tensor,
        exponential: bool,
        labels: tuple[Tensor, Tensor],
    ) -> None:
        self.rows, self.cols, self.values, self.exponential = rows, cols, values, exponential
        self.own = cols.stop - cols.start if rows.start == cols.start else 0
        self.near = len(labels[0])
        self._labels, self._buffers = labels, buffers
        self._powers: dict[str, Tensor] = {}
        self._shared: dict[Over, Tensor] = {}

    def height(self, over: Over) -> int:
        """How many rows, the first, have pairs with a weight."""
        return self.near if over == "positives" else len(self.values)

    def buffer(self, name: str, height: int) -> Tensor:
        """Memory `[height, cols]`, which the next tile uses again."""
        return self._buffers.of(name, (height, self.values.shape[1]))

    def power(self, scale: float, over: Over) -> Tensor:
        """e^(scale s_ij) of the rows that have a weight, 0 for a sample with itself; of 2 and more as a square."""
        height = self.height(over)
        if self.exponential and scale == 1:
            return self.values[:height]
        name = f"e^{scale}s of {'near' if over == 'positives' else 'all'} rows"
        if name not in self._powers:
            buffer = self.buffer(name, height)
            if scale >= 2:
                torch.square(self.power(scale / 2, over), out=buffer)
            else:
                self.without_own_(torch.mul(self.values[:height], scale, out=buffer).exp_())
            self._powers[name] = buffer
        return self._powers[name]

    def without_own_(self, values: Tensor) -> Tensor:
        """0 for each sample with itself."""
        return values.fill_diagonal_(0) if self.own else values

    def weigh_(self, values: Tensor, over: Over) -> Tensor:
        """Multiply `values`, of all rows that have a weight, by 1, a_ij or 1 - a_ij."""
        if self.near and over != "others":
            values[: self.near].mul_(self._weights(over))
        return values

    def gather(self, sums: Tensor, values: Tensor, over: Over) -> None:
        """Add each sample's weighed sum to `sums` `[N]`; `values`, of all rows that have a weight, stay as they are."""
        first = 0 if over == "others" else self.near
        if first:
            buffer = self.buffer("weighed", first)
            weighed = torch.mul(values[:first], self._weights(over), out=buffer)
            self.add_rows(sums, weighed)
            self.add_cols(sums, weighed)
        if first < len(values):
            self.add_rows(sums, values[first:], first)
            self.add_cols(sums, values[first:])

    def add_rows(self, sums: Tensor, values: Tensor, first: int = 0) -> None:
        """Add the sum of each row of `values`, which begin at row `first`, unless it is a column as well."""
        beyond = max(self.own - first, 0)
        start = self.rows.start + first
        sums[start + beyond : start + len(values)].add_(values[beyond:].sum(1))

    def add_cols(self, sums: Tensor, values: Tensor) -> None:
        """Add the sum of each column."""
        sums[self.cols].add_(values.sum(0))

    def spread(self, gradient: Tensor, slopes: Tensor, z: Tensor) -> None:
        """Add to `gradient` `[N, d]` what reaches z through s_ij and s_ji, whose `slopes`, of all rows or of the first,
        are added up already."""
        start, stop = self.rows.start, self.rows.start + len(slopes)
        gradient[self.cols].addmm_(slopes.T, z[start:stop])
        gradient[start + self.own : stop].addmm_(slopes[self.own :], z[self.cols])

    def _weights(self, over: Over) -> Tensor:
        """a_ij or 1 - a_ij, `[near, cols]`."""
        if not self._shared:
            self._shared["positives"] = shared_classes(*self._labels, self.values.dtype)
        if over not in self._shared:
            buffer = self.buffer("negative", self.near)
            self._shared[over] = torch.sub(1, self._shared["positives"], out=buffer)
        return self._shared[over]


class Buffers:
    """Named pieces of memory, made when they are first asked for."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._named: dict[str, Tensor] = {}

    def of(self, name: str, shape: tuple[int, int]) -> Tensor:
        if name not in self._named or self._named[name].numel() < shape[0] * shape[1]:
            self._named[name] = self._like.new_empty(shape[0] * shape[1])
        return self._named[name][: shape[0] * shape[1]].view(shape)


class Tiles:
    """All tiles of a batch. The samples are sorted by label: the pairs that may be positive are near the diagonal.

    features `[N, d]`, labels `[N]` or `[N, C]`, in the order of the batch. z `[N, d]` are the features in the order of
    the tiles, scaled so that z z' is the similarity s. exponential: whether e^s takes its place in the tiles.
    """

    def __init__(
        self, features: Tensor, labels: Labels, temperature: float, exponential: bool
    ) -> None:
        keys = labels if labels.ndim == 1 else labels.argmax(1)
        self.order = keys.argsort(stable=True)
        self._places = self.order.argsort()
        self.scale = temperature**-0.5
        self.z = self.in_tile_order(features).mul_(self.scale)
        self._labels = self.in_tile_order(labels.detach())
        self._exponential = exponential
        self._buffers = Buffers(self.z)
        self._kept: dict[tuple[int, int], Tensor] = {}
        # One block, which the allocator keeps for the next step; many small ones it would give back.
        self._free = self.z.new_empty(min(KEPT, len(features) ** 2))
        ends = [*range(0, len(features), WIDTH), len(features)]
        self._cols = [slice(*bounds) for bounds in pairwise(ends)]

    def near(self) -> Iterator[Tile]:
        """Tiles of the rows that may share a class with a column, and no others."""
        ends = self._ends()
        return self._tiles(ends, ends)

    def all(self) -> Iterator[Tile]:
        """The lower triangle."""
        return self._tiles([len(self.z)] * len(self._cols), self._ends())

    def in_tile_order(self, rows: Tensor) -> Tensor:
        """Rows in the order of the tiles, from rows in that of the batch."""
        return rows.index_select(0, self.order)

    def in_batch_order(self, rows: Tensor) -> Tensor:
        """Rows in the order of the batch, from rows in that of the tiles."""
        return rows.index_select(0, self._places)

    def _tiles(self, stops: list[int], ends: list[int]) -> Iterator[Tile]:
        """From the diagonal to each strip's stop. ends: where the classes of each strip's columns end."""
        for cols, stop, end in zip(self._cols, stops, ends, strict=True):
            for start in range(cols.start, stop, HEIGHT):
                rows = slice(start, min(start + HEIGHT, stop))
                labels = self._labels[start : min(rows.stop, end)], self._labels[cols]
                values, new = self._values(rows, cols)
                tile = Tile(self._buffers, rows, cols, values, self._exponential, labels)
                if new:
                    tile.without_own_(values.exp_() if self._exponential else values)
                yield tile

    def _values(self, rows: slice, cols: slice) -> tuple[Tensor, bool]:
        """Those that were kept, or similarities, of which the first are kept for the backward pass."""
        key, shape = (rows.start, cols.start), (rows.stop - rows.start, cols.stop - cols.start)
        if key in self._kept:
            return self._kept[key], False
        size = shape[0] * shape[1]
        if size <= len(self._free):
            values, self._free = self._free[:size].view(shape), self._free[size:]
            self._kept[key] = values
        else:
            values = self._buffers.of("values", shape)
        return torch.mm(self.z[rows], self.z[cols].T, out=values), True

    def _ends(self) -> list[int]:
        """Where the classes of each strip of columns end.

        Soft labels may share a class anywhere; and any device but the CPU would have to be waited for.
        """
        if self._labels.ndim == 2 or self._labels.device.type != "cpu":
            return [len(self.z)] * len(self._cols)
        last = self._labels[[cols.stop - 1 for cols in self._cols]]
        ends: list[int] = torch.searchsorted(self._labels, last, right=True).tolist()
        return ends
