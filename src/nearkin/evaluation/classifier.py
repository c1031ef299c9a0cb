"""`Classifier`: a trained model that classifies images and names the evidence. Decodes beside the network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearkin.data.decode import BadImage, decoded, from_pillow
from nearkin.data.images import Arrays
from nearkin.data.loader import stacked
from nearkin.data.threads import in_threads
from nearkin.device import choose_device, without_tf32
from nearkin.errors import DataError, ModelError, counted, printable
from nearkin.evaluation.calibration import scaled
from nearkin.evaluation.evaluator import mean_probabilities
from nearkin.evaluation.kin import CLOSEST, Kin, distance, nearest, read_kin, unlike
from nearkin.evaluation.metrics import ranked
from nearkin.evaluation.model import Bundle, load_bundle
from nearkin.evaluation.options import EVIDENCE, Device, Tta
from nearkin.evaluation.predict import find_files
from nearkin.evaluation.results import UNKNOWN, KinImage, Prediction
from nearkin.evaluation.sets import Coverage, Sets, coverage
from nearkin.evaluation.tta import COUNTS, tta_views
from nearkin.process import cores
from nearkin.types import Outputs

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = str | os.PathLike[str] | Image | NDArray[np.uint8]

BATCH = 64  # views that pass through the network at once
TOGETHER = 8  # images that a thread decodes in a row
CLOSE = 1e-6  # shares are float32


class Read(NamedTuple):
    """An image ready for the network, or why it is not. views: uint8 `[C, H, W]` each, in the size of the model."""

    name: str
    views: tuple[Tensor, ...]
    error: str | None


class Classifier:
    """A trained model, ready to classify; `nearkin.load` makes it.

        model = nearkin.load("runs/photos")
        found = model("new.jpg")
        found.label, found.probability, found.kin

    An image is a path, a Pillow image, or an array uint8 `[H, W, 3]` (RGB), `[H, W, 1]` or `[H, W]`. Images are
    decoded in threads beside the network. classes: of the model. notes: sentences for a person, such as that evidence
    is missing. An image that cannot be read gives a Prediction with `error`.
    """

    def __init__(
        self,
        bundle: Bundle,
        kin: Kin | None,
        run: Path,
        *,
        most: int,
        reject: float | None,
        sets: Sets | None,
        tta: Tta,
        notes: Sequence[str],
    ) -> None:
        """kin: on the device of the network. most: kin to name."""
        self.classes, self.notes, self.run = bundle.classes, tuple(notes), run
        self._bundle, self._kin, self._most, self._reject, self._sets = (
            bundle,
            kin,
            most,
            reject,
            sets,
        )
        self._kin_classes = [] if kin is None else [self.classes[k] for k in kin.labels.tolist()]
        self._temperature = bundle.description.temperature or 1.0
        self._device = next(bundle.network.parameters()).device
        self._channels = bundle.description.spec.channels
        self._views, self._count = tta_views(tta, bundle.description.transform), COUNTS[tta]

    @overload  # a str is a Sequence, too; the first signature wins
    def __call__(self, images: Picture) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Sequence[Picture]) -> list[Prediction]: ...

    def __call__(self, images: Picture | Sequence[Picture]) -> Prediction | list[Prediction]:
        """The prediction for one image, or a list of them for a list of images; folders and patterns may stand in it.

        Raises DataError when a path does not exist, and for an array of another shape or type.
        """
        if isinstance(images, Sequence) and not isinstance(images, str):
            return list(chain.from_iterable(self.batches(_found(images))))
        if isinstance(images, str | os.PathLike):
            self._check_file(os.fspath(images))
        else:
            _check(images)
        (batch,) = self.batches([images])
        return batch[0]

    @staticmethod
    def _check_file(path: str) -> None:
        shown = printable(path)
        if os.path.isdir(path):  # noqa: PTH112 - a Path would change how names are shown
            raise DataError(f"{shown} is a folder; give a list with it for all its images.")
        if not os.path.lexists(path):
            raise DataError(f"{shown} does not exist; give an image file.")

    def embed(self, images: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """The embeddings `[N, e]` of N images, or `[1, e]` of one: the features, or of `cone` from scratch the
        projection.

        They are of any length, so compare by cosine.

        Raises BadImage (a DataError) for an image that cannot be read.
        """
        rows = []
        many: Sequence[Picture]
        many = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        for read, embeddings in self.embeddings(_found(many)):
            for one in read:
                if one.error is not None:
                    raise BadImage(one.name, one.error)
            rows.append(embeddings)
        if not rows:
            raise DataError("There are no images to embed.")
        return np.concatenate(rows)

    def embeddings(
        self, images: Iterable[Picture]
    ) -> Iterator[tuple[list[Read], NDArray[np.float32]]]:
        """Batches of images in their order, and the rows `[n, e]` of those that could be read."""
        for read, outputs in self._passed(images):
            rows = np.empty((0, 0), np.float32)
            if outputs is not None:
                rows = self._embedding(outputs).cpu().numpy()
            yield read, rows

    def batches(self, images: Iterable[Picture]) -> Iterator[list[Prediction]]:
        """Predictions in the order of `images`, a batch at a time, as soon as they are known. Paths are of files."""
        for read, outputs in self._passed(images):
            known = iter([] if outputs is None else self._predictions(read, outputs))
            yield [
                next(known)
                if one.error is None
                else Prediction(one.name, None, None, (), one.error)
                for one in read
            ]

    def coverage(self) -> Coverage | None:
        """What the prediction sets do on the run's own test split; None without sets. Raises DataError without one."""
        if self._sets is None:
            return None
        return coverage(self._sets, self.run, self._bundle, self._temperature, self._device)

    def _passed(self, images: Iterable[Picture]) -> Iterator[tuple[list[Read], Outputs | None]]:
        """Batches of read images, and the network's outputs for those without an error, view after view."""
        size = max(1, BATCH // self._count)
        with closing(in_threads(self._read, enumerate(images), cores(), TOGETHER)) as chunks:
            ready = chain.from_iterable(chunks)
            while read := list(islice(ready, size)):
                views = [one.views for one in read if one.error is None]
                outputs = None
                if views:
                    batch = stacked([view for same in zip(*views, strict=True) for view in same])
                    with torch.inference_mode(), without_tf32():
                        outputs = self._bundle.network(batch.to(self._device))
                yield read, outputs

    def _read(self, numbered: tuple[int, Picture]) -> Read:
        number, image = numbered
        path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        name = f"image {number}" if path is None else path
        try:
            if path is not None:
                pixels = decoded(path, self._channels)
            elif isinstance(image, np.ndarray):
                pixels = _from_array(image, self._channels)
            else:
                pixels = from_pillow(image, self._channels, name)  # type: ignore[arg-type]
            return Read(name, self._views(pixels), None)
        except BadImage as error:
            return Read(name, (), error.reason)

    @torch.inference_mode()
    def _predictions(self, read: Sequence[Read], outputs: Outputs) -> Iterator[Prediction]:
        names = [one.name for one in read if one.error is None]
        if outputs.logits is None:
            raise ModelError("This model has no classifier, so it has no classes to predict.")
        raw = mean_probabilities(outputs.logits, len(names))
        if not bool(raw.isfinite().all()):
            raise ModelError("The model gives probabilities that are not finite; train it anew.")
        shown = scaled(raw, self._temperature) if self._temperature != 1 else raw
        top, _ = ranked(raw)  # scaling keeps the order, but for rounding
        columns = top.tolist(), shown.gather(1, top).tolist()
        sets = self._set_rows(shown, top[:, 0])
        evidence = self._evidence(outputs)
        for name, classes, values, (share, kin), members in zip(
            names, *columns, evidence, sets, strict=True
        ):
            top5 = tuple((self.classes[c], value) for c, value in zip(classes, values, strict=True))
            guess, probability = top5[0]
            label = UNKNOWN if self._is_far(share) else guess
            yield Prediction(name, label, probability, top5, None, share, kin, guess, members)

    def _is_far(self, share: float | None) -> bool:
        return share is not None and self._reject is not None and share >= 1 - self._reject - CLOSE

    def _embedding(self, outputs: Outputs) -> Tensor:
        """`[n, e]`: the mean over the views."""
        rows = outputs.embedding.float()
        return rows.view(self._count, -1, rows.shape[1]).mean(0)

    def _evidence(self, outputs: Outputs) -> list[tuple[float | None, tuple[KinImage, ...]]]:
        """How unlike anything each image is, and its nearest training images."""
        embeddings, kin = self._embedding(outputs), self._kin
        if kin is None:
            return [(None, ())] * len(embeddings)
        if kin.embeddings.shape[1] != embeddings.shape[1]:
            raise ModelError(
                f"{EVIDENCE} of {printable(str(self.run))} does not fit its model; were files of two runs mixed?"
            )
        found = nearest(kin, embeddings, most=max(self._most, CLOSEST))
        # The distances of validation images are those of one view.
        shares = unlike(kin, distance(found)) if self._count == 1 else None
        ours = [None] * len(embeddings) if shares is None else shares.tolist()
        rows = zip(found.index.tolist(), found.similarity.tolist(), strict=True)
        images = [
            tuple(
                KinImage(kin.names[k], self._kin_classes[k], value)
                for k, value in islice(zip(index, similarity, strict=True), self._most)
            )
            for index, similarity in rows
        ]
        return list(zip(ours, images, strict=True))

    def _set_rows(self, shown: Tensor, top: Tensor) -> Iterable[tuple[str, ...] | None]:
        """The set of each image, most probable class first."""
        if self._sets is None:
            return [None] * len(shown)
        members = self._sets.members(shown, top)
        order = shown.scatter(1, top[:, None], 2.0).argsort(dim=1, descending=True, stable=True)
        sizes = members.sum(1).tolist()
        return [
            tuple(self.classes[c] for c in row[:size])
            for row, size in zip(order.tolist(), sizes, strict=True)
        ]


def load_classifier(
    run: Path, *, kin: int, reject: float | None, sets: float | None, tta: Tta, device: Device
) -> Classifier:
    """See `nearkin.load`, which checks the arguments."""
    chosen = torch.device(choose_device(device))
    bundle = load_bundle(run, chosen)
    shown, notes = printable(str(run)), list[str]()
    if not (run / EVIDENCE).is_file():
        notes.append(
            f"{shown} has no {EVIDENCE} (it was imported, or trained by an earlier version), so nothing is said of its "
            "training images"
        )
        known, chosen_sets = None, None
    else:
        known = read_kin(run, len(bundle.classes))
        if (reject or sets) and len(known.scores) == 0:
            asked = "reject" if reject else "sets"
            raise ModelError(
                f"--{asked} needs validation images, and {shown} was trained without any; train it with --val-split."
            )
        chosen_sets = Sets.calibrated(known.scores, sets) if sets else None
        notes += _few(len(known.scores), reject, chosen_sets)
        placed: dict[str, Any] = {
            name: value.to(chosen)
            for name, value in known._asdict().items()
            if isinstance(value, Tensor)
        }
        known = known._replace(**placed)
    if reject and UNKNOWN in bundle.classes:
        notes.append(
            f"{shown} has a class {UNKNOWN} of its own: where label and guess are both {UNKNOWN}, it may be either"
        )
    return Classifier(
        bundle, known, run, most=kin, reject=reject, sets=chosen_sets, tta=tta, notes=notes
    )


def _few(images: int, reject: float | None, sets: Sets | None) -> Iterator[str]:
    """What so few validation images mean."""
    count = counted(images, "validation image")
    if reject and images * reject < 1 - CLOSE:
        yield f"with {count} --reject {reject:g} means: farther than all of them"
    if sets and sets.limit == float("inf"):
        yield f"with {count} sets of {100 * sets.confidence:g} % hold every class"


def _found(images: Iterable[Picture]) -> Iterator[Picture]:
    """The images, with folders and patterns among them replaced by their files, checked before any is decoded."""
    found: list[Any] = []
    for image in images:
        if isinstance(image, str | os.PathLike):
            found += find_files(Path(image) if not isinstance(image, str) else image)[0]
        else:
            _check(image)
            found.append(image)
    return iter(found)


def _check(image: Any) -> None:
    """Raises DataError for what is no image."""
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
        colour = image.ndim == 3 and image.shape[2] == 3
        if image.dtype == np.uint8 and image.size and (grey or colour):
            return
        shape = " x ".join(map(str, image.shape))
        raise DataError(
            f"An array of an image is uint8 H x W x 3 (grey: H x W), not {image.dtype} {shape}; convert it first."
        )
    from PIL.Image import Image

    if not isinstance(image, Image):
        raise DataError(
            f"A {type(image).__name__} is no image; give a path, a Pillow image or an array uint8 H x W x 3."
        )


def _from_array(array: NDArray[np.uint8], channels: int) -> Tensor:
    """uint8 `[channels, H, W]`, grey as `Arrays` makes it."""
    array = np.require(array, requirements=["C", "W"])  # a view of a Pillow image is read-only
    pixels = array[None] if array.ndim == 3 else array[None, :, :, None]
    return Arrays(pixels, "", channels).read(0)
