"""`plots/` of a run: what the first batch shows the network, and which images the objective takes for positives.

Every crop is the one that training makes: it is drawn with the key of its image, epoch and view, and no state is
touched. At most 64 images are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.dataset import Split
from nearkin.data.sampling import SampleKey, sample_seed
from nearkin.errors import counted
from nearkin.files import own_folder, write_atomic
from nearkin.objectives import Stage
from nearkin.report.axes import Svg
from nearkin.report.page import standalone
from nearkin.report.sheet import Cell, Row, sheet
from nearkin.settings import Settings
from nearkin.training.batches import batch_keys, transform_of

PLOTS = "plots"
SAMPLES, DRAWS = 8, 4
ANCHORS, SHOWN = 6, 6  # anchors, and positives of each; 8 + 6 * 7 images at most
WHAT = {
    "class": "All other crops of its class in the batch are positives.",
    "crops": "Other crops of the same image are positives; other images of its class are not.",
    "bank": "Images of its class in the bank are positives, but for itself. The bank is empty at the start; shown is "
    "what this batch leaves in it.",
}


class Crop(NamedTuple):
    """One view of one draw; view -1 is the image as it is."""

    key: SampleKey
    view: int


def draw(run: Path, settings: Settings, split: Split, stage: Stage) -> None:
    """Write `plots/samples.svg`, and `plots/positives.svg` where the stage contrasts. split: train. stage: the first.

    Raises BadImage or SaveFailed.
    """
    sketch = _Sketch(settings, split, stage)
    pictures = {"samples": sketch.samples()}
    if stage.pairs != "none":
        pictures["positives"] = sketch.positives()
    own_folder(run / PLOTS)
    for name, svg in pictures.items():
        write_atomic(run / PLOTS / f"{name}.svg", standalone(svg).encode())


def positives(keys: list[SampleKey], labels: NDArray[np.int64], stage: Stage) -> list[list[Crop]]:
    """For the first crop of each image of a batch, the crops that are its positives; other crops of the image first.

    keys: of the global batch. labels: `[B]` of its images.
    """
    views, anchor = range(stage.views), 0
    found = []
    for place, key in enumerate(keys):
        own = [Crop(key, view) for view in views if view != anchor]
        kin = [other for other in _kin(place, labels, stage) if other != place]
        if stage.pairs == "bank":
            kept = [Crop(keys[other], stage.views - 1) for other in kin]
            found.append([crop for crop in kept if crop.key.row != key.row])
        elif stage.pairs == "class":
            found.append(own + [Crop(keys[other], view) for other in kin for view in views])
        else:
            found.append(own if stage.pairs == "crops" else [])
    return found


def _kin(place: int, labels: NDArray[np.int64], stage: Stage) -> Iterator[int]:
    """The places of the images of its class, in the part of the batch that is contrasted with it."""
    size = stage.within or len(labels)
    for other in np.flatnonzero(labels == labels[place]).tolist():
        if other // size == place // size:
            yield other


class _Sketch:
    """The pictures of one batch."""

    def __init__(self, settings: Settings, split: Split, stage: Stage) -> None:
        self.settings, self.split, self.stage = settings, split, stage
        self.keys = batch_keys(settings, split, 0)
        self.labels = split.labels[[key.row for key in self.keys]]
        self.transform = transform_of(settings)

    def samples(self) -> Svg:
        """Eight images of the batch: each as it is, and four draws of its augmentation."""
        keys = list({key.row: key for key in reversed(self.keys)}.values())[::-1][:SAMPLES]
        views = self.stage.views
        draws = [(number // views, number % views) for number in range(DRAWS)]  # epoch, view
        wanted = [
            [Crop(key, -1), *(Crop(key._replace(epoch=epoch), view) for epoch, view in draws)]
            for key in keys
        ]
        cells = self._cells(crop for crops in wanted for crop in crops)
        rows = [Row(self._class(crops[0]), [cells[crop] for crop in crops]) for crops in wanted]
        mixed = self.settings.mixup > 0 or self.settings.cutmix > 0
        return sheet(
            rows,
            title="Augmented samples",
            description="Images of the first batch as they are, and the crops that the network sees of them."
            + (" Mixing with another image of the batch comes after that." if mixed else ""),
            columns=["image", *(self._name(epoch, view) for epoch, view in draws)],
        )

    def positives(self) -> Svg:
        """Six anchors of different classes, and the first six positives of each."""
        found = positives(self.keys, self.labels, self.stage)
        _, first = np.unique(self.labels, return_index=True)
        places = sorted(first.tolist())[:ANCHORS]
        shown = [[Crop(self.keys[place], 0), *found[place][:SHOWN]] for place in places]
        cells = self._cells(crop for crops in shown for crop in crops)
        rows = [
            Row(
                f"{self._class(crops[0])}: {counted(len(found[place]), 'positive')}",
                [cells[crop] for crop in crops],
            )
            for place, crops in zip(places, shown, strict=True)
        ]
        alone = sum(not crops for crops in found)
        return sheet(
            rows,
            title="Positive pairs",
            description=f"Anchors of the first batch and their positives. {WHAT[self.stage.pairs]} "
            f"{alone} of {len(found)} anchors have none in this batch.",
            columns=["anchor", "positives", *[""] * (SHOWN - 1)],
        )

    def _cells(self, crops: Iterable[Crop]) -> dict[Crop, Cell]:
        """One image after the other is read, since a few hundred large photos would not fit into memory."""
        made = {}
        ordered = sorted(set(crops))
        for row, same in groupby(ordered, key=lambda crop: crop.key.row):
            image = self.split.images.read(row)
            for crop in same:
                seed = sample_seed(
                    self.settings.seed, crop.key.epoch, row, crop.key.occurrence, crop.view
                )
                seen = (
                    image if crop.view < 0 else next(iter(self.transform.of_each([image], [seed])))
                )
                pixels = seen.permute(1, 2, 0).numpy()
                made[crop] = Cell(pixels, f"{self._class(crop)}: {self.split.images.name(row)}")
        return made

    def _class(self, crop: Crop) -> str:
        return self.split.classes[int(self.split.labels[crop.key.row])]

    def _name(self, epoch: int, view: int) -> str:
        student = view < self.stage.student_views
        return f"epoch {epoch + 1}" if student else "teacher"
