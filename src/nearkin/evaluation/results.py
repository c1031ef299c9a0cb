"""What evaluate, predict and fewshot return: frozen dataclasses whose `to_dict` gives plain values for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Averages(NamedTuple):
    """Means over the classes that occur in the split, in [0, 1]."""

    precision: float
    recall: float
    f1: float


class ClassMetrics(NamedTuple):
    """Metrics of one class, in [0, 1]; 0 where the denominator is 0. support: images of the class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Confused(NamedTuple):
    """images: how many of the class `true` were classified as `predicted`."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of a whole split; fractions in [0, 1], nothing rounded.

    n: images. top1: share whose most probable class is the label. top5: share whose label is among the min(5, C) most
    probable, so 1 for C <= 5. log_loss: -mean ln max(p_label, 1e-12), in nats. ece: expected calibration error.
    macro: means over the classes with support > 0. per_class: in class order.
    confusion: the counts of the confusion matrix that are not zero, in class order.
    """

    n: int
    top1: float
    top5: float
    log_loss: float
    ece: float
    macro: Averages
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[Confused, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of `top1`."""
        return wilson(self.top1, self.n)

    @property
    def worst(self) -> Confused | None:
        """The two classes that are confused most often; None where nothing is wrong."""
        wrong = (pair for pair in self.confusion if pair.true != pair.predicted)
        return max(wrong, key=lambda pair: pair.images, default=None)

    def totals(self) -> dict[str, Any]:
        """The values that do not grow with the number of classes."""
        names = ("n", "top1", "top5", "log_loss", "ece")
        return {name: getattr(self, name) for name in names} | {
            "interval": list(self.interval),
            "macro": self.macro._asdict(),
            "most_confused": self.worst and self.worst._asdict(),
        }


NORMAL_95 = 1.959964  # the quantile of the normal distribution for 95 % confidence


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n independent trials, of 95 % confidence (Wilson 1927).

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    """
    z = NORMAL_95
    centre, spread = share + z * z / (2 * n), share * (1 - share) / n + (z / (2 * n)) ** 2
    half, scale = z * math.sqrt(spread), 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class MemberMetrics(NamedTuple):
    """One run of an evaluation. weight: its share in the ensemble. cached: its predictions were read from a file."""

    run: str
    weight: float
    top1: float
    cached: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation(Metrics):
    """The metrics of one run, or of several as an ensemble, on `split`.

    run: the first of `members`. notes: sentences for a person. confusion_file, classes_file: CSV files with
    `confusion` and `per_class`; None where they could not be written, which `notes` says.
    """

    run: str
    split: str
    tta: str
    weights: str
    members: tuple[MemberMetrics, ...]
    notes: tuple[str, ...]
    confusion_file: Path | None
    classes_file: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The counts of the confusion matrix are in `confusion_file` only."""
        record = {name: value for name, value in vars(self).items() if name != "confusion"}
        return record | {
            "interval": list(self.interval),
            "macro": self.macro._asdict(),
            "per_class": [
                {"class": row.name} | dict(zip(row._fields[1:], row[1:], strict=True))
                for row in self.per_class
            ],
            "members": [member._asdict() for member in self.members],
            "notes": list(self.notes),
            "confusion_file": self.confusion_file and str(self.confusion_file),
            "classes_file": self.classes_file and str(self.classes_file),
        }


class KinImage(NamedTuple):
    """A training image near to an image. path: relative to the run's DATA, as in `predictions.csv`. label: its class.
    similarity: the cosine of the two embeddings, in [-1, 1]."""

    path: str
    label: str
    similarity: float


UNKNOWN = "unknown"


@dataclass(frozen=True)
class Prediction:
    """The class of one image, and the evidence for it.

    path: as it was given; of an image without a file `image N`, its place among those given. label: the class, or
    `unknown` where the image was rejected. probability: of `guess`, in [0, 1], calibrated on validation where the run
    has a temperature. top5: up to five (class, probability), most probable first. error: why the image could not be
    read; then there is nothing else.
    unlike: the share of the validation images that are nearer to their kin than this one, in [0, 1]; None where it is
    not known. kin: the nearest training images, nearest first. guess: the most probable class, also of a rejected
    image. set: classes, most probable first, that hold the right one with the confidence asked for; None unless asked.
    """

    path: str
    label: str | None
    probability: float | None
    top5: tuple[tuple[str, float], ...]
    error: str | None = None
    unlike: float | None = None
    kin: tuple[KinImage, ...] = ()
    guess: str | None = None
    set: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "class": self.label,
            "probability": self.probability,
            "top5": [{"class": name, "probability": value} for name, value in self.top5],
            "error": self.error,
            "unlike": self.unlike,
            "kin": [
                {"path": one.path, "class": one.label, "similarity": one.similarity}
                for one in self.kin
            ],
            "guess": self.guess,
            "set": None if self.set is None else list(self.set),
        }


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The accuracy of few-shot episodes, in [0, 1].

    mean, std (with n - 1): of the episodes' accuracies. interval: 1.96 std / sqrt(episodes). classes: of the data.
    eligible: classes with enough images. shared: eligible classes that the run was trained on. notes: sentences for a
    person. The other fields repeat the options.
    """

    run: str
    data: str
    split: str
    ways: int
    shots: int
    queries: int
    episodes: int
    copies: int
    seed: int
    classes: int
    eligible: int
    shared: tuple[str, ...]
    mean: float
    std: float
    interval: float
    episodes_per_second: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"shared": list(self.shared), "notes": list(self.notes)}
