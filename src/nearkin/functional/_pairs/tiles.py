"""The similarities of a batch in tiles of the lower triangle: the matrix is symmetric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nearkin.functional._common import Labels, shared_classes
from nearkin.functional._pairs.plain import Over

# Rows and columns of a tile. On a CPU it stays in the cache together with its exponentials, and products of wide tiles
# take up to 1.5 times as long as those of tall ones in some processes. A GPU needs large products and few calls (not
# measured there).
SHAPE = 2048, 256
SHAPE_ON_GPU = 8192, 2048


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile on this device."""
    return SHAPE if device.type == "cpu" else SHAPE_ON_GPU


class Tile:
    """The similarities s_ij of the samples `rows` with the samples `cols`, whose first sample is not after the rows'.

    own: the first `own` rows are the columns themselves: all of them on the diagonal, else 0.
    near: the first `near` rows may share a class with a column. labels: those of the near rows and of the columns.
    """

    def __init__(
        self,
        tiles: Tiles,
        rows: slice,
        cols: slice,
        similarity: Tensor,
        labels: tuple[Tensor, Tensor],
    ) -> None:
        self.rows, self.cols, self.similarity = rows, cols, similarity
        self.own = similarity.shape[1] if rows.start == cols.start else 0
        self.near = len(labels[0])
        self._labels, self._tiles = labels, tiles
        self._shared: dict[Over, Tensor] = {}

    def height(self, over: Over) -> int:
        """The rows after the first `height` have no pair of this kind."""
        return self.near if over == "positives" else len(self.similarity)

    def buffer(self, name: str, height: int) -> Tensor:
        """Memory `[height, cols]`, reused by the next tile."""
        return self._tiles.buffer(name, (height, self.similarity.shape[1]))

    def exponentials(self, scales: set[float]) -> dict[float, Tensor]:
        """e^(scale s_ij) for each scale, 0 for a sample with itself. Scale 1 overwrites the similarity."""
        found = {}
        for scale in scales - {1.0, 2.0}:
            out = self.buffer(f"e^{scale}s", len(self.similarity))
            found[scale] = torch.mul(self.similarity, scale, out=out).exp_()
        found[1.0] = self.similarity.exp_()
        for values in found.values() if self.own else ():
            values.fill_diagonal_(0)
        if 2.0 in scales:  # a square is cheaper than an exponential
            found[2.0] = torch.square(found[1.0], out=self.buffer("e^2s", len(self.similarity)))
        return found

    def weigh_(self, values: Tensor, over: Over) -> None:
        """Multiply `values` of `height(over)` rows by 1, a_ij or 1 - a_ij."""
        if self.near and over != "others":
            values[: self.near].mul_(self._weights(over))

    def add_weighed(self, sums: Tensor, values: Tensor, over: Over) -> None:
        """Add each sample's weighed sum of `values` of `height(over)` rows to `sums` `[N]`."""
        weighed = 0 if over == "others" else self.near
        if weighed:
            buffer = self.buffer("weighed", weighed)
            self.add(sums, torch.mul(values[:weighed], self._weights(over), out=buffer))
        if weighed < len(values):
            self.add(sums, values[weighed:], first=weighed)

    def add(self, sums: Tensor, values: Tensor, first: int = 0) -> None:
        """Add the sums of the rows of `values`, which begin at row `first`, and of its columns to `sums` `[N]`."""
        own = max(self.own - first, 0)  # these rows are columns as well
        start = self.rows.start + first
        sums[start + own : start + len(values)].add_(values[own:].sum(1))
        sums[self.cols].add_(values.sum(0))

    def add_gradient(self, gradient: Tensor, slopes: Tensor, z: Tensor) -> None:
        """Add slopes times z to `gradient` `[N, d]`. slopes: for s_ij plus for s_ji, of the first rows."""
        start, stop = self.rows.start, self.rows.start + len(slopes)
        gradient[self.cols].addmm_(slopes.T, z[start:stop])
        gradient[start + self.own : stop].addmm_(slopes[self.own :], z[self.cols])

    def _weights(self, over: Over) -> Tensor:
        """a_ij or 1 - a_ij, `[near, cols]`."""
        if not self._shared:
            self._shared["positives"] = shared_classes(*self._labels, self.similarity.dtype)
        if over not in self._shared:
            buffer = self.buffer("negative", self.near)
            self._shared[over] = torch.sub(1, self._shared["positives"], out=buffer)
        return self._shared[over]


class Tiles:
    """All tiles of a batch whose samples are sorted by label, so that positive pairs lie near the diagonal.

    features `[N, d]`, labels `[N]` or `[N, C]`, in the order of the batch. z `[N, d]`: the sorted features, scaled so
    that z z' is the similarity s.
    """

    def __init__(self, features: Tensor, labels: Labels, temperature: float) -> None:
        keys = labels if labels.ndim == 1 else labels.argmax(1)
        self._order = keys.argsort(stable=True)
        self._places = self._order.argsort()
        self.scale = temperature**-0.5
        self.z = self.sorted(features.detach()).mul_(self.scale)
        self.labels = self.sorted(labels.detach())
        self._memory: dict[str, Tensor] = {}
        self._height, width = tile_shape(features.device)
        count = len(features)
        self._cols = [slice(at, min(at + width, count)) for at in range(0, count, width)]

    def strips(self) -> list[tuple[slice, slice]]:
        """Samples in strips as wide as a tile, each with the samples that may share a class with it.

        All may for soft labels, which may share a class anywhere, and on a GPU, which would have to be waited for.
        """
        if self.labels.ndim == 2 or self.labels.device.type != "cpu":
            return [(cols, slice(0, len(self.z))) for cols in self._cols]
        first = torch.searchsorted(self.labels, self.labels[[c.start for c in self._cols]])
        last = self.labels[[c.stop - 1 for c in self._cols]]
        end = torch.searchsorted(self.labels, last, right=True)
        ranges = map(slice, first.tolist(), end.tolist())
        return list(zip(self._cols, ranges, strict=True))

    def sorted(self, samples: Tensor, dim: int = 0) -> Tensor:
        """From the order of the batch to that of the tiles."""
        return samples.index_select(dim, self._order)

    def unsorted(self, samples: Tensor, dim: int = 0) -> Tensor:
        """From the order of the tiles to that of the batch."""
        return samples.index_select(dim, self._places)

    def buffer(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Memory of this name, allocated at its first use."""
        size = shape[0] * shape[1]
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self.z.new_empty(size)
        return self._memory[name][:size].view(shape)

    def all(self) -> Iterator[Tile]:
        """The lower triangle: each column strip from the diagonal down."""
        for cols, others in self.strips():
            for start in range(cols.start, len(self.z), self._height):
                rows = slice(start, min(start + self._height, len(self.z)))
                labels = self.labels[start : min(rows.stop, others.stop)], self.labels[cols]
                shape = rows.stop - rows.start, cols.stop - cols.start
                out = self.buffer("similarity", shape)
                torch.mm(self.z[rows], self.z[cols].T, out=out)
                yield Tile(self, rows, cols, out, labels)
