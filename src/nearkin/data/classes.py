"""What is odd about the classes of a data set, for training's notes and for `nearkin doctor`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nearkin.errors import counted, listed, printable

if TYPE_CHECKING:
    from nearkin.data.dataset import Split

LINES = 3  # at the start of a training
IMBALANCE = 10  # times as many training images in the largest class as in the smallest


class Remark(NamedTuple):
    """code: the kind. text: what there is. advice: what to do, to be put behind it. classes: whose training images it
    concerns."""

    code: str
    text: str
    advice: str
    classes: tuple[str, ...] = ()


def class_remarks(splits: Mapping[str, Split], classes: tuple[str, ...]) -> Iterator[Remark]:
    """Classes that are missing in val or test, have a single training image, have names that collide, or are of very
    unequal sizes. splits: their labels are places in `classes`."""
    for split in splits.values():
        if split.name != "train":
            yield from missing_classes(split, classes)
    counts = np.bincount(splits["train"].labels, minlength=len(classes))
    single = [classes[place] for place in np.flatnonzero(counts == 1)]
    advice = "; add images, or leave such classes out"
    for remark in _remark(single, "single-image", "a single training image", advice):
        yield remark._replace(classes=tuple(single))
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(folded(name), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            what = f"class names that differ only in case, spaces or Unicode form: {listed(names)}"
            yield Remark("colliding-names", what, "; put their images into one folder")
    yield from _imbalance(counts, classes)


def folded(name: str) -> str:
    """The same for names that differ only in case, spaces around them or Unicode form."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def short(remarks: Iterable[Remark]) -> list[str]:
    """At most three lines for the start of a training."""
    texts = [remark.text for remark in remarks]
    if len(texts) > LINES:
        more = len(texts) - LINES + 1
        texts = [
            *texts[: LINES - 1],
            f"and {more} more remarks about classes: nearkin doctor shows all",
        ]
    return texts


def missing_classes(split: Split, classes: tuple[str, ...]) -> Iterator[Remark]:
    """The classes that have no image in the split, if there are any."""
    counts = np.bincount(split.labels, minlength=len(classes))
    absent = [classes[place] for place in np.flatnonzero(counts == 0)]
    advice = "; its accuracy says nothing about them"
    yield from _remark(absent, "missing-class", f"no image in the split {split.name}", advice)


def _remark(classes: list[str], code: str, what: str, advice: str) -> Iterator[Remark]:
    if classes:
        number = counted(len(classes), "class has", "classes have")
        yield Remark(code, f"{number} {what}: {listed(classes)}", advice)


def _imbalance(counts: np.typing.NDArray[np.int64], classes: tuple[str, ...]) -> Iterator[Remark]:
    present = np.flatnonzero(counts)
    if len(present) == 0:
        return
    least, most = (int(present[pick(counts[present])]) for pick in (np.argmin, np.argmax))
    if counts[most] >= IMBALANCE * counts[least]:
        text = (
            f"{printable(classes[most])} has {counts[most]} training images and {printable(classes[least])} has "
            f"{counts[least]}"
        )
        yield Remark("imbalance", text, "; --sampler weighted draws all classes equally often")
