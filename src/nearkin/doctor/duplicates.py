"""Images that occur more than once: equal pixels, and nearly equal ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.doctor.findings import Finding, Level
from nearkin.doctor.inventory import Inventory
from nearkin.doctor.scan import Scan
from nearkin.errors import counted

Rows = NDArray[np.int64]
Pairs = NDArray[np.int64]

HAMMING = 8  # bits of 64 in which the hashes of near duplicates may differ
SIMILAR = 0.95  # least cosine of the features of near duplicates
SURE = 4  # bits, where there are no features to confirm by
ALIKE = 0.98  # least cosine of the pixels of 16 x 16, where there are no features
LEAST_SIDE = 32  # pixels; hashes of smaller images say little
LEAST_RANGE = 0.1  # of brightness; the same of images of one colour
CHUNK = 2**22  # pairs of hashes that are compared at once, 32 MiB
MOST_PAIRS = 2_000_000  # near pairs that are kept


class Copies(NamedTuple):
    """Groups of images that show the same. group: `[N]`, equal for images of one group and -1 for all others. exact:
    `[N]`, whether another image has the very same pixels. cut: whether there were more near pairs than are kept. apart:
    how many images are too small or too plain to be compared by hashes."""

    group: Rows
    exact: NDArray[np.bool_]
    cut: bool = False
    apart: int = 0

    def groups(self) -> list[Rows]:
        """The images of each group, in order."""
        members = np.flatnonzero(self.group >= 0)
        members = members[np.argsort(self.group[members], kind="stable")]
        ends = np.flatnonzero(np.diff(self.group[members])) + 1
        return [rows for rows in np.split(members, ends) if len(rows)]


def find_copies(
    scan: Scan,
    features: NDArray[np.float32] | None,
    pixels: Callable[[Rows], NDArray[np.float32]] | None = None,
) -> tuple[Copies, Copies]:
    """Exact copies, and near ones: groups of the images whose pixels are equal, and of those that are alike.

    Near: the pHashes differ in at most 8 of 64 bits and the cosine of the features is at least 0.95; without features
    at most 4 bits, and the cosine of the pixels is at least 0.98. A group of near copies has images of at least two
    groups of exact ones, or none. Time grows with the square of the number of different images (10 000: 50 million
    pairs), memory does not: pairs are compared in blocks.

    features: `[N, d]` of unit length. pixels: gives those of some images, `[n, d]` of unit length; without both, hashes
    alone decide.
    """
    total = len(scan.height)
    readable = np.flatnonzero(scan.readable)
    _, first, place, counts = np.unique(
        scan.identity[readable], return_index=True, return_inverse=True, return_counts=True
    )
    place = place.reshape(-1)
    exact = np.zeros(total, np.bool_)
    exact[readable] = counts[place] > 1
    group = np.full(total, -1)
    group[readable] = place
    same = Copies(np.where(exact, group, -1), exact)

    side = np.minimum(scan.height, scan.width)
    distinct = readable[np.sort(first)]
    told = (side[distinct] >= LEAST_SIDE) & (scan.range[distinct] >= LEAST_RANGE)
    apart = int((~told).sum())
    distinct = distinct[told]
    pairs, cut = near_pairs(scan.phash[distinct], SURE if features is None else HAMMING)
    pairs = distinct[pairs]
    if features is not None and len(pairs):
        pairs = pairs[_cosines(features, pairs) >= SIMILAR]
    elif pixels is not None and len(pairs):
        rows, ends = np.unique(pairs, return_inverse=True)
        pairs = pairs[_cosines(pixels(rows), ends.reshape(-1, 2)) >= ALIKE]
    return same, Copies(_joined(pairs, group, total), exact, cut, apart)


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> tuple[Pairs, bool]:
    """The pairs `[P, 2]`, i < j, of `hashes` `[n]` that differ in at most `distance` bits; and whether the search
    ended early, with more than two million pairs."""
    found: list[Pairs] = []
    count, total = len(hashes), 0
    step = max(1, CHUNK // max(1, count))
    for start in range(0, count, step):
        block = hashes[start : start + step]
        rest = hashes[start:]
        near = np.bitwise_count(block[:, None] ^ rest[None, :]) <= distance
        rows, columns = np.nonzero(near)
        later = columns > rows
        found.append(np.stack([rows[later], columns[later]], axis=1) + start)
        total += int(later.sum())
        if total > MOST_PAIRS:
            return np.concatenate(found)[:MOST_PAIRS], True
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64), False


def _cosines(features: NDArray[np.float32], pairs: Pairs) -> NDArray[np.float32]:
    parts = [
        np.einsum("pd,pd->p", features[part[:, 0]], features[part[:, 1]])
        for part in np.array_split(pairs, max(1, len(pairs) // 4096))
    ]
    return np.concatenate(parts)


def _joined(pairs: Pairs, group: Rows, total: int) -> Rows:
    """`[N]`, the group of each image when the pairs are connected, with exact copies; -1 without a pair."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if len(pairs) == 0:
        return np.full(total, -1)
    size = int(group.max()) + 1
    ends = group[pairs]
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    joined = np.isin(component, component[ends[:, 0]])
    found = np.where(joined, component, -1)
    result: Rows = np.where(group >= 0, found[group], -1)
    return result


def copy_findings(inventory: Inventory, exact: Copies, near: Copies) -> Iterator[Finding]:
    """Findings for copies across splits, across classes, and of one class in one split; exact ones first."""
    for copies, kind in ((exact, "exact"), (near, "near")):
        yield from _across_splits(inventory, copies, kind)
        yield from _across_classes(inventory, copies, kind)
        yield from _within(inventory, copies, kind)
    if near.apart:
        text = (
            f"{counted(near.apart, 'image is', 'images are')} not searched for near copies: below {LEAST_SIDE} px, or "
            "of almost one colour"
        )
        yield Finding("ok", "near-copies", text)
    if near.cut:
        text = (
            f"there are more than {MOST_PAIRS} pairs of near copies, of which the first are grouped"
        )
        yield Finding("warning", "near-copies", text)


WORDS = {"exact": ("an exact copy", "exact copies"), "near": ("a near copy", "near copies")}


def _across_splits(inventory: Inventory, copies: Copies, kind: str) -> Iterator[Finding]:
    """Leakage: images of val or test that also occur in train, or in each other."""
    groups = [rows for rows in copies.groups() if len(np.unique(inventory.split[rows])) > 1]
    if not groups:
        return
    names = inventory.names
    leaked = [_leaked(inventory, groups, number) for number in range(1, len(names))]
    parts = [
        f"{count} of {int((inventory.split == number).sum())} {names[number]} images"
        for number, count in enumerate(leaked, start=1)
        if count
    ]
    said = []
    if parts:
        verb = "has" if sum(leaked) == 1 else "have"
        said.append(
            f"{' and '.join(parts)} {verb} {WORDS[kind][0]} in train, so that the accuracy on them is too good"
        )
    if {"val", "test"} <= set(names):
        val, test = names.index("val"), names.index("test")
        met = _leaked(inventory, groups, val, test)
        if met:
            said.append(
                f"{counted(met, 'image of val has', 'images of val have')} {WORDS[kind][0]} in test, so that "
                "choosing the best epoch has seen the test"
            )
    what = "; ".join(said)
    level: Level = "error" if kind == "exact" else "warning"
    text = f"{what}; train on the table that --write-table FILE writes without them"
    rows = np.concatenate(groups)
    yield Finding(
        level, f"{kind}-leakage", text, inventory.concerned(rows, _details(inventory, groups))
    )


def _leaked(inventory: Inventory, groups: list[Rows], number: int, other: int = 0) -> int:
    """How many images of a split occur in another one, by default in train, whose number is 0."""
    return sum(
        int((inventory.split[rows] == number).sum())
        for rows in groups
        if (inventory.split[rows] == other).any()
    )


def _across_classes(inventory: Inventory, copies: Copies, kind: str) -> Iterator[Finding]:
    groups = [rows for rows in copies.groups() if len(np.unique(inventory.labels[rows])) > 1]
    if groups:
        some = "image is" if len(groups) == 1 else "images are"
        text = (
            f"{len(groups)} {some} in two classes or more, as {WORDS[kind][1]}: a label is wrong, or the image shows "
            "both; mark or delete the wrong ones"
        )
        rows, details = np.concatenate(groups), _details(inventory, groups)
        yield Finding("warning", f"{kind}-two-classes", text, inventory.concerned(rows, details))


def _within(inventory: Inventory, copies: Copies, kind: str) -> Iterator[Finding]:
    """Copies of one class in one split."""
    groups = [
        rows
        for rows in copies.groups()
        if len(np.unique(inventory.labels[rows])) == 1
        and len(np.unique(inventory.split[rows])) == 1
    ]
    if groups:
        extra = sum(len(rows) - 1 for rows in groups)
        verb = "is" if extra == 1 else "are"
        text = (
            f"{counted(extra, 'image')} {verb} {WORDS[kind][extra > 1]} of another of the same class; "
            "--write-table FILE leaves them out"
        )
        rows, details = np.concatenate(groups), _details(inventory, groups)
        yield Finding("warning", f"{kind}-copies", text, inventory.concerned(rows, details))


def _details(inventory: Inventory, groups: list[Rows]) -> dict[int, str]:
    """For each image the first other one of its group."""
    return {
        int(row): f"like {inventory.path(int(rows[1] if row == rows[0] else rows[0]))}"
        for rows in groups
        for row in rows
    }


def contradicting(inventory: Inventory, copies: Copies) -> set[int]:
    """The rows of groups whose images have different labels."""
    groups = (rows for rows in copies.groups() if len(np.unique(inventory.labels[rows])) > 1)
    return {int(row) for rows in groups for row in rows}


def superfluous(inventory: Inventory, copies: Copies) -> set[int]:
    """The rows to leave out so that every image occurs once: of a group one stays, rather in test than in val than in
    train, and of those the first; none where its labels contradict each other."""
    out = contradicting(inventory, copies)
    for rows in copies.groups():
        best = max(rows.tolist(), key=lambda row: (int(inventory.split[row]), -row))
        out |= set(rows.tolist()) - {best}
    return out
