"""Findings about single images: unreadable, tiny, huge, oddly shaped, blank, dark, bright, blurred, turned, grey."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.doctor.findings import Finding, Level
from nearkin.doctor.inventory import Inventory
from nearkin.doctor.scan import Scan
from nearkin.errors import counted, listed, printable

# Scores below which cleanvision 0.3.7 reports an image.
DARK, LIGHT, LOW_INFORMATION, BLURRY, SHAPE = 0.32, 0.05, 0.3, 0.29, 0.35
BLANK = 0.02  # range of brightness
SMALL_SET = 32  # pixels; of data sets with a usual side below it brightness, blur and information are not judged
TINY = 32  # pixels of the short side, where the usual one is at least twice that
HUGE = 16_000_000  # pixels
ODD_GREY = 0.5  # difference between the shares of grey images of two classes
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class _Check(NamedTuple):
    code: str
    found: NDArray[np.bool_]
    one: str
    many: str
    advice: str
    level: Level = "warning"


def quality_findings(inventory: Inventory, scan: Scan) -> Iterator[Finding]:
    """A finding for each kind of fault that occurs. Of a blank image nothing is said but that."""
    yield from _unreadable(inventory, scan)
    if not scan.readable.any():
        return
    for check in (*_looks(scan), *_shapes(scan)):
        rows = np.flatnonzero(check.found)
        if len(rows):
            number = counted(len(rows), f"image {check.one}", f"images {check.many}")
            files = inventory.concerned(rows, _sizes(scan, rows))
            yield Finding(check.level, check.code, f"{number}; {check.advice}", files)
    yield from _modes(inventory, scan)


def _looks(scan: Scan) -> Iterator[_Check]:
    """Of few bits, of one colour, dark, bright, with few shades, blurred: each image has one of these at most."""
    advice = "look, and delete what shows nothing of its class"
    judged = _usual_side(scan) >= SMALL_SET
    blank = scan.readable & (scan.range < BLANK)
    deep = scan.readable & np.isin(scan.mode, DEEP_MODES) & (scan.range > 0)
    deep &= (scan.dark < DARK) & (blank | judged)
    yield _Check(
        "few-bits",
        deep,
        "of 16-bit grey is almost black",
        "of 16-bit grey are almost black",
        "if they use fewer than 16 bits, as those of many cameras do, rescale them to all 16",
    )
    blank &= ~deep
    yield _Check("blank", blank, "has one colour only", "have one colour only", "delete them")
    if not judged:
        return
    left = scan.readable & ~blank & ~deep
    for code, scores, least, words in (
        ("dark", scan.dark, DARK, "very dark"),
        ("bright", scan.light, LIGHT, "very bright"),
        ("low-information", scan.low_information, LOW_INFORMATION, "of very few shades"),
        ("blurred", scan.blurry, BLURRY, "blurred, or of little contrast"),
    ):
        found = left & (scores < least)
        left &= ~found
        yield _Check(code, found, f"is {words}", f"are {words}", advice)


def _shapes(scan: Scan) -> Iterator[_Check]:
    """Tiny, huge, narrow, turned."""
    short, long = np.minimum(scan.height, scan.width), np.maximum(scan.height, scan.width)
    usual, ratio = _usual_side(scan), short / np.maximum(long, 1)
    narrow = scan.readable & (ratio < SHAPE)
    if np.median(ratio[scan.readable]) < SHAPE:  # it is how these images are
        narrow[:] = False
    tiny = scan.readable & (short < TINY) & (usual >= 2 * TINY)
    size, million = f"smaller than {TINY} pixels", f"more than {HUGE // 10**6} million pixels"
    advice = f"the usual short side is {usual}; look whether they are thumbnails"
    yield _Check("tiny", tiny, f"is {size}", f"are {size}", advice)
    huge = scan.height * scan.width > HUGE
    advice = "shrink them once, or train with --cache disk: decoding takes most of the time"
    yield _Check("huge", huge, f"has {million}", f"have {million}", advice)
    advice = "crop them: training cuts squares out of them"
    words = "very long and narrow"
    yield _Check("odd-shape", narrow, f"is {words}", f"are {words}", advice)
    words = "stored turned, with an EXIF orientation"
    advice = "nearkin turns them, other programs may not"
    yield _Check("turned", scan.readable & scan.turned, f"is {words}", f"are {words}", advice, "ok")


def _usual_side(scan: Scan) -> int:
    """The median short side, in pixels."""
    return int(np.median(np.minimum(scan.height, scan.width)[scan.readable]))


def _sizes(scan: Scan, rows: NDArray[np.int64]) -> dict[int, str]:
    return {int(row): f"{scan.width[row]} x {scan.height[row]}" for row in rows}


def _unreadable(inventory: Inventory, scan: Scan) -> Iterator[Finding]:
    reasons = scan.reasons
    if reasons:
        first = min(reasons)
        text = (
            f"{counted(len(reasons), 'image')} cannot be read, such as {printable(inventory.path(first))} "
            f"({reasons[first]}); repair or delete them, or train with --bad-images skip"
        )
        yield Finding("error", "unreadable", text, inventory.concerned(sorted(reasons), reasons))


def _modes(inventory: Inventory, scan: Scan) -> Iterator[Finding]:
    """How the files store colours, where that differs; and classes that it gives away."""
    known = scan.readable & (scan.mode != "")
    if not known.any():
        return
    modes, counts = np.unique(scan.mode[known], return_counts=True)
    if len(modes) > 1:
        shown = ", ".join(f"{mode} {number}" for mode, number in zip(modes, counts, strict=True))
        usual = modes[counts.argmax()]
        rows = np.flatnonzero(known & (scan.mode != usual))
        details = {int(row): str(scan.mode[row]) for row in rows}
        alpha = int(np.isin(scan.mode[known], ALPHA_MODES).sum())
        white = f"; transparent parts of {counted(alpha, 'image')} become white" if alpha else ""
        text = f"files store colours in different ways ({shown}){white}; training reads all of them alike"
        yield Finding("ok", "colour-modes", text, inventory.concerned(rows, details))
    grey = known & np.isin(scan.mode, GREY_MODES)
    classes = len(inventory.classes)
    totals = np.bincount(inventory.labels[known], minlength=classes)
    shares = np.bincount(inventory.labels[grey], minlength=classes) / np.maximum(totals, 1)
    present = np.flatnonzero(totals)
    if np.ptp(shares[present]) > ODD_GREY:
        least = shares[present].min() + ODD_GREY
        most = [inventory.classes[place] for place in present if shares[place] > least]
        rows = np.flatnonzero(grey)
        text = (
            f"grey images are common in {counted(len(most), 'class', 'classes')} and rare in others ({listed(most)}), "
            "so that colour gives the class away; use --channels 1, or add coloured ones"
        )
        yield Finding("warning", "grey-classes", text, inventory.concerned(rows))
