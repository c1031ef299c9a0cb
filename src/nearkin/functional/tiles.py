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
KEPT = 2**22  # similarities that the backward pass finds again: 16 MiB


class Tile:
    """The samples `rows` with the samples `cols`, none of which comes after the rows.

    similarity: s_ij, `[rows, cols]`. positive: a_ij, or None where no pair is positive. own: how many of the rows,
    the first, are the columns themselves, so that each of their pairs stands there twice: all or none.
    """

    def __init__(self, buffers: Buffers, rows: slice, cols: slice, similarity: Tensor) -> None:
        self.rows, self.cols, self.similarity = rows, cols, similarity
        self.own = cols.stop - cols.start if rows.start == cols.start else 0
        self.positive: Tensor | None = None
        self._buffers = buffers
        self._shape = (rows.stop - rows.start, cols.stop - cols.start)
        self._powers: dict[float, Tensor] = {}
        self._negatives: Tensor | None = None

    @property
    def beyond(self) -> slice:
        """The rows that are not columns as well."""
        return slice(self.rows.start + self.own, self.rows.stop)

    def buffer(self, name: str) -> Tensor:
        """Memory in the tile's shape, which the next tile uses again."""
        return self._buffers.of(name, self._shape)

    def lacks(self, over: Over) -> bool:
        """Whether no pair here has any weight."""
        return over == "positives" and self.positive is None

    def weigh_(self, values: Tensor, over: Over) -> Tensor:
        """Multiply `values` by 1, a_ij or 1 - a_ij, and by 0 for a sample with itself."""
        if self.positive is not None and over != "others":
            values.mul_(self.positive if over == "positives" else self._negative(self.positive))
        return values.fill_diagonal_(0) if self.own else values

    def weighed(self, values: Tensor, over: Over) -> Tensor:
        """The same, and `values` stay as they are."""
        if self.positive is None:
            return values
        return self.weigh_(self.buffer("weighed").copy_(values), over)

    def power(self, scale: float) -> Tensor:
        """e^(scale s_ij), each scale once; of 2 and more the square of the half's, cheaper than an exponential."""
        if scale not in self._powers:
            buffer = self.buffer(f"power {scale}")
            if scale >= 2:
                torch.square(self.power(scale / 2), out=buffer)
            elif scale == 1:
                torch.exp(self.similarity, out=buffer)
            else:
                torch.mul(self.similarity, scale, out=buffer).exp_()
            self._powers[scale] = buffer
        return self._powers[scale]

    def gather_rows(self, sums: Tensor, values: Tensor) -> None:
        """Add the sum of each row of `values` that is not a column as well to `sums` `[N]`."""
        sums[self.beyond].add_(values[self.own :].sum(1))

    def gather_cols(self, sums: Tensor, values: Tensor) -> None:
        """Add the sum of each column."""
        sums[self.cols].add_(values.sum(0))

    def spread(self, gradient: Tensor, slopes: Tensor, z: Tensor) -> None:
        """Add to `gradient` `[N, d]` what reaches z through s_ij and s_ji, whose `slopes` are added up already."""
        gradient[self.cols].addmm_(slopes.T, z[self.rows])
        gradient[self.beyond].addmm_(slopes[self.own :], z[self.cols])

    def _negative(self, positive: Tensor) -> Tensor:
        if self._negatives is None:
            self._negatives = torch.sub(1, positive, out=self.buffer("negative"))
        return self._negatives


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
    the tiles, scaled so that z z' is the similarity.
    """

    def __init__(self, features: Tensor, labels: Labels, temperature: float) -> None:
        labels = _hard_if_known(labels)
        keys = labels if labels.ndim == 1 else labels.argmax(1)
        self.order = keys.argsort(stable=True)
        self.scale = temperature**-0.5
        self.z = features[self.order].mul_(self.scale)
        self._labels = labels[self.order].detach()
        self._buffers = Buffers(self.z)
        self._kept: dict[tuple[int, int], Tensor] = {}
        # One block, which the allocator keeps for the next step; many small ones it would give back.
        self._free = self.z.new_empty(min(KEPT, len(features) ** 2))
        ends = [*range(0, len(features), WIDTH), len(features)]
        self._cols = [slice(*bounds) for bounds in pairwise(ends)]

    def near(self) -> Iterator[Tile]:
        """Tiles that may hold positive pairs."""
        for cols, end in zip(self._cols, self._ends(), strict=True):
            for rows in _chunks(cols.start, end):
                tile = self._tile(rows, cols)
                tile.positive = shared_classes(self._labels[rows], self._labels[cols], self.z.dtype)
                yield tile

    def all(self) -> Iterator[Tile]:
        """The lower triangle: those, and the tiles without a positive pair."""
        yield from self.near()
        for cols, end in zip(self._cols, self._ends(), strict=True):
            for rows in _chunks(end, len(self.z)):
                yield self._tile(rows, cols)

    def in_batch_order(self, rows: Tensor) -> Tensor:
        """Rows in the order of the batch, from rows in that of the tiles."""
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def _tile(self, rows: slice, cols: slice) -> Tile:
        """Similarities of the first tiles are kept for the backward pass, of others computed again."""
        key, shape = (rows.start, cols.start), (rows.stop - rows.start, cols.stop - cols.start)
        similarity, size = self._kept.get(key), shape[0] * shape[1]
        if similarity is None:
            keep = size <= len(self._free)
            similarity = (
                self._free[:size].view(shape) if keep else self._buffers.of("similarity", shape)
            )
            torch.mm(self.z[rows], self.z[cols].T, out=similarity)
            if keep:
                self._kept[key], self._free = similarity, self._free[size:]
        return Tile(self._buffers, rows, cols, similarity)

    def _ends(self) -> list[int]:
        """Where the classes of each strip of columns end.

        Soft labels may share a class anywhere; and any device but the CPU would have to be waited for.
        """
        if self._labels.ndim == 2 or self._labels.device.type != "cpu":
            return [len(self.z)] * len(self._cols)
        last = self._labels[[cols.stop - 1 for cols in self._cols]]
        ends: list[int] = torch.searchsorted(self._labels, last, right=True).tolist()
        return ends


def _hard_if_known(labels: Labels) -> Labels:
    """Rows of one class each as integers, where it costs no waiting to know: they need the fewest tiles."""
    if labels.ndim == 2 and labels.device.type == "cpu" and bool((labels.amax(1) == 1).all()):
        return labels.argmax(1)
    return labels


def _chunks(start: int, end: int) -> list[slice]:
    return [slice(i, min(i + HEIGHT, end)) for i in range(start, end, HEIGHT)]
