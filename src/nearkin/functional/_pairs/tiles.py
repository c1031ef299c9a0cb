"""The similarities of a batch in tiles of the lower triangle: the matrix is symmetric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nearkin.functional._common import Labels, shared_classes
from nearkin.functional._pairs.terms import Over

# Rows and columns of a tile. On a CPU it stays in the cache together with its exponentials, and products of wide tiles
# take up to 1.5 times as long as those of tall ones in some processes. A GPU needs large products and few calls (not
# measured there).
SHAPE = 2048, 256
SHAPE_ON_GPU = 8192, 2048


class Tile:
    """The similarities s_ij of the samples `rows` with the samples `cols`, whose first sample is not after the rows'.

    own: the first `own` rows are the columns themselves: all of them on the diagonal, else 0.
    near: the first `near` rows may share a class with a column. labels: those of the near rows and of the columns.
    """

    def __init__(
        self,
        buffers: Buffers,
        rows: slice,
        cols: slice,
        similarity: Tensor,
        labels: tuple[Tensor, Tensor],
    ) -> None:
        self.rows, self.cols, self.similarity = rows, cols, similarity
        self.own = similarity.shape[1] if rows.start == cols.start else 0
        self.near = len(labels[0])
        self._labels, self._buffers = labels, buffers
        self._shared: dict[Over, Tensor] = {}

    def height(self, over: Over) -> int:
        """The rows after the first `height` have no pair of this kind."""
        return self.near if over == "positives" else len(self.similarity)

    def buffer(self, name: str, height: int) -> Tensor:
        """Memory `[height, cols]`, reused by the next tile."""
        return self._buffers.of(name, (height, self.similarity.shape[1]))

    def exponentials(self, scales: set[float]) -> dict[float, Tensor]:
        """e^(scale s_ij) for each scale, 0 for a sample with itself. Scale 1 overwrites the similarity."""
        found = {}
        for scale in scales - {1.0, 2.0}:
            out = self.buffer(f"e^{scale}s", len(self.similarity))
            found[scale] = torch.mul(self.similarity, scale, out=out).exp_()
        found[1.0] = self.similarity.exp_()
        for values in found.values():
            self.clear_own_(values)
        if 2.0 in scales:  # a square is cheaper than an exponential
            found[2.0] = torch.square(found[1.0], out=self.buffer("e^2s", len(self.similarity)))
        return found

    def clear_own_(self, values: Tensor) -> Tensor:
        """Set the pairs of a sample with itself to 0."""
        return values.fill_diagonal_(0) if self.own else values

    def weigh_(self, values: Tensor, over: Over) -> Tensor:
        """Multiply `values` of `height(over)` rows by 1, a_ij or 1 - a_ij."""
        if self.near and over != "others":
            values[: self.near].mul_(self._weights(over))
        return values

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
        self.add_rows(sums, values, first)
        sums[self.cols].add_(values.sum(0))

    def add_rows(self, sums: Tensor, values: Tensor, first: int = 0) -> None:
        """Add the sums of the rows, without the own ones: these are columns as well."""
        skipped = max(self.own - first, 0)
        start = self.rows.start + first
        sums[start + skipped : start + len(values)].add_(values[skipped:].sum(1))

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


class Buffers:
    """Named memory, allocated at its first use."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._named: dict[str, Tensor] = {}

    def of(self, name: str, shape: tuple[int, int]) -> Tensor:
        if name not in self._named or self._named[name].numel() < shape[0] * shape[1]:
            self._named[name] = self._like.new_empty(shape[0] * shape[1])
        return self._named[name][: shape[0] * shape[1]].view(shape)


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
        self._labels = self.sorted(labels.detach())
        self._buffers = Buffers(self.z)
        self._height, width = SHAPE if features.device.type == "cpu" else SHAPE_ON_GPU
        count = len(features)
        self._cols = [slice(at, min(at + width, count)) for at in range(0, count, width)]

    def all(self) -> Iterator[Tile]:
        """The lower triangle."""
        return self._tiles([len(self.z)] * len(self._cols), self._class_ends())

    def near(self) -> Iterator[Tile]:
        """Only tiles whose rows may share a class with a column."""
        ends = self._class_ends()
        return self._tiles(ends, ends)

    def sorted(self, samples: Tensor, dim: int = 0) -> Tensor:
        """From the order of the batch to that of the tiles."""
        return samples.index_select(dim, self._order)

    def unsorted(self, samples: Tensor, dim: int = 0) -> Tensor:
        """From the order of the tiles to that of the batch."""
        return samples.index_select(dim, self._places)

    def _tiles(self, stops: list[int], ends: list[int]) -> Iterator[Tile]:
        """Each column strip from the diagonal to its row in `stops`; rows after that in `ends` share no class."""
        for cols, stop, end in zip(self._cols, stops, ends, strict=True):
            for start in range(cols.start, stop, self._height):
                rows = slice(start, min(start + self._height, stop))
                labels = self._labels[start : min(rows.stop, end)], self._labels[cols]
                out = self._buffers.of(
                    "similarity", (rows.stop - rows.start, cols.stop - cols.start)
                )
                torch.mm(self.z[rows], self.z[cols].T, out=out)
                yield Tile(self._buffers, rows, cols, out, labels)

    def _class_ends(self) -> list[int]:
        """The row at which the last class of each column strip ends.

        The last row for soft labels, which may share a class anywhere, and on a GPU, which would have to be waited for.
        """
        if self._labels.ndim == 2 or self._labels.device.type != "cpu":
            return [len(self.z)] * len(self._cols)
        last = self._labels[[cols.stop - 1 for cols in self._cols]]
        ends: list[int] = torch.searchsorted(self._labels, last, right=True).tolist()
        return ends
