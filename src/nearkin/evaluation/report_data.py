"""What the report of a run shows, as plain values: predictions, a map, the kin of each image, and small pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nearkin.data.dataset import Split
from nearkin.data.images import Files
from nearkin.evaluation.calibration import scaled
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.kin import CLOSEST, Kin, distance, nearest, unlike
from nearkin.evaluation.kinship import LEAST, Kinship, kinship
from nearkin.evaluation.metrics import reduced, summarise
from nearkin.evaluation.projection import has_tsne, pca, tsne, unit_square
from nearkin.evaluation.results import Metrics
from nearkin.evaluation.sprite import LARGEST, Sprite, sprite
from nearkin.evaluation.suspects import Suspects, suspects
from nearkin.network import Network
from nearkin.types import Predictions

MOST_VALUES = 1 << 26  # probabilities of a split held at once: 256 MiB; of more images, spread ones
MOST_SEEN = 50_000  # images whose embeddings are held at once; of more, evenly spread ones
MOST_IMAGES = 10_000  # of the evaluated split in the page
MOST_POINTS = 10_000  # up to which every training image is in the page, too
MOST_TSNE = 2_000  # images; 5 s on one core
MOST_PICTURES = 2_000
USUAL = 24  # bytes of a file's name
LISTED = 24  # images in a list
EXAMPLES = 6  # of a pair of classes
PAIRS = 12
DOUBTFUL = 0.5  # the votes for one other label, less those for its own, from which a training image is listed

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Seen(NamedTuple):
    """What a network says about images of a split. rows: `[R]` of the split, rising. embeddings: `[R, e]`.
    probabilities: `[R, C]`."""

    split: Split
    rows: Ints
    embeddings: Tensor
    probabilities: Tensor

    @property
    def labels(self) -> Ints:
        found: Ints = self.split.labels[self.rows]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """The images in the page: first `evaluated` of the evaluated split, then training images.

    names: as in predictions.csv. labels: `[n]`. predicted: `[n]`, -1 for training images. probability: of the
    predicted class; own: of the label, both calibrated; unlike: share of validation images that are nearer to their
    kin; suspicion: the votes of a training image's neighbours for the label `other` (see `evaluation.suspects`; -1:
    they name none); all `[n]`, NaN where not known. places: `[n, 2]` in [0, 1]. other_places: the
    same by t-SNE, NaN for images that it leaves out; None without it.
    """

    evaluated: int
    names: tuple[str, ...]
    labels: Ints
    predicted: Ints
    probability: Floats
    own: Floats
    unlike: Floats
    suspicion: Floats
    other: Ints
    places: Floats
    other_places: Floats | None


class Pair(NamedTuple):
    """images: of the class `true` that were taken for `predicted`. examples: places in `Images`."""

    true: str
    predicted: str
    images: int
    examples: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """A finished run, looked at.

    split: of the evaluation, with `metrics` of all its images. confidence, correct: `[R]` of all or evenly spread ones,
    as trained; calibrated: the confidence with the temperature, None where that is not known. kin: of the images
    `with_kin`, its index being places in `images`; `attended`: how many kin have a weight. variance: share that the
    map shows. worst, uncertain, suspicious: places in `images`. mislabelled: number of the `trained` images
    of the kin whose label may be wrong. training: number of all training images. root: folder of the names, empty for
    built-in data.
    """

    classes: tuple[str, ...]
    split: str
    metrics: Metrics
    temperature: float | None
    confidence: Floats
    calibrated: Floats | None
    correct: NDArray[np.bool_]
    images: Images
    kin: Kinship
    with_kin: Ints
    attended: int
    variance: float
    worst: Ints
    uncertain: Ints
    suspicious: Ints
    pairs: tuple[Pair, ...]
    mislabelled: int
    trained: int
    training: int
    sprite: Sprite
    root: str


def see(evaluator: Evaluator, network: Network, split: Split) -> tuple[Predictions, Seen]:
    """The predictions for a split, and what the report needs of it, from one pass where all of that fits into memory,
    else from a second one; on every process."""
    count, classes = len(split.labels), len(split.classes)
    if count <= MOST_SEEN and count * classes <= MOST_VALUES:
        rows = np.arange(count)
        found = evaluator.embeddings_and_probabilities(network, split, rows.tolist())
        index = torch.from_numpy(rows)
        return reduced(found[1], torch.from_numpy(split.labels), index), Seen(split, rows, *found)
    predictions = evaluator.predictions(network, split)
    rows = _spread(count, max(1, min(MOST_IMAGES, MOST_VALUES // classes)))
    found = evaluator.embeddings_and_probabilities(network, split, rows.tolist())
    return predictions, Seen(split, rows, *found)


def gather(
    predictions: Predictions,
    seen: Seen,
    kin: Kin,
    train: Split,
    temperature: float | None,
    *,
    with_tsne: bool = True,
    pictures: int = MOST_PICTURES,
) -> ReportData:
    """What the report shows.

    predictions: of the whole split, whose images `seen` holds or samples. kin, temperature: of the model. train: the
    split with the images of `kin`. with_tsne: draw a second map, if it is installed.
    """
    metrics = summarise(predictions, seen.split.classes)
    every = _said(seen, temperature)
    seen, said = _limited(seen, every)
    doubt = suspects(kin.embeddings, kin.labels.numpy(), len(train.classes))
    listed = _suspicious(doubt)
    kept, place, related, with_kin = _training(kin, seen, listed)
    images, variance = _images(seen, said, kin, kept, doubt, place[listed] if with_tsne else None)
    pairs = _pairs(metrics, images)
    uncertain = _smallest(said.calibrated, np.ones(len(seen.rows), dtype=bool))
    lists = _smallest(-said.calibrated, ~said.correct), uncertain, place[listed]
    first = np.concatenate([*lists, *(pair.examples for pair in pairs)]).astype(np.int64)
    wanted = _order(images, related, with_kin, first, said.correct)[:pictures]
    return ReportData(
        classes=seen.split.classes,
        split=seen.split.name,
        metrics=metrics,
        temperature=temperature,
        confidence=every.confidence,
        calibrated=None if temperature is None else every.calibrated,
        correct=every.correct,
        images=images,
        kin=related,
        with_kin=with_kin,
        attended=min(kin.neighbours, len(kin.labels)),
        variance=variance,
        worst=lists[0],
        uncertain=uncertain,
        suspicious=lists[2],
        pairs=pairs,
        mislabelled=int(doubt.suspicious.sum()),
        trained=len(kin.labels),
        training=len(train.labels),
        sprite=_sprite(wanted, seen, kin, kept, train, images.names),
        root=_root(seen.split),
    )


def _suspicious(found: Suspects) -> Ints:
    """The rows of the most suspicious labels, the worst first."""
    listed = found.ranking[:LISTED]
    return listed[(found.votes - found.own)[listed] >= DOUBTFUL]


def _root(split: Split) -> str:
    return split.images.files.root if isinstance(split.images, Files) else ""


class _Said(NamedTuple):
    """Of R images: predicted class, its probability as trained and calibrated, that of the label, calibrated, and
    whether the prediction is right; all `[R]`."""

    predicted: Ints
    confidence: Floats
    calibrated: Floats
    own: Floats
    correct: NDArray[np.bool_]


def _said(seen: Seen, temperature: float | None) -> _Said:
    labels, plain = torch.from_numpy(seen.labels), seen.probabilities.float()
    fitted = plain if temperature is None else scaled(plain, temperature)
    confidence, predicted = plain.max(1)
    own = fitted.gather(1, labels[:, None])[:, 0]
    return _Said(
        predicted.numpy(),
        confidence.numpy(),
        fitted.gather(1, predicted[:, None])[:, 0].numpy(),
        own.numpy(),
        (predicted == labels).numpy(),
    )


def _spread(count: int, most: int) -> Ints:
    """At most `most` of `count` rows, evenly."""
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).round().astype(np.int64))


def _limited(seen: Seen, said: _Said) -> tuple[Seen, _Said]:
    """Those in the page: up to a half of MOST_IMAGES errors, those that the network is most sure of, then evenly spread
    images that are right."""
    if len(seen.rows) <= MOST_IMAGES:
        return seen, said
    wrong, right = np.flatnonzero(~said.correct), np.flatnonzero(said.correct)
    wrong = wrong[np.argsort(-said.calibrated[wrong], kind="stable")[: MOST_IMAGES // 2]]
    right = right[_spread(len(right), MOST_IMAGES - len(wrong))]
    some = np.sort(np.concatenate([wrong, right]))
    kept = Seen(seen.split, seen.rows[some], seen.embeddings[some], seen.probabilities[some])
    return kept, _Said(*(column[some] for column in said))


def _training(kin: Kin, seen: Seen, listed: Ints) -> tuple[Ints, Ints, Kinship, Ints]:
    """The training images in the page.

    All of them with their kin, where that makes no more than MOST_POINTS images; else the kin of the others, and the
    listed ones with their kin. Gives their rows of `kin`; the place of each row among the images (-1: not there, and at
    the end, for a kin that is missing); kin of `seen` and of training images, as places; the places of these images.
    """
    total, classes = len(kin.labels), len(seen.split.classes)
    asked = np.arange(total) if len(seen.rows) + total <= MOST_POINTS else listed
    own = torch.from_numpy(asked)
    first = kinship(kin, seen.embeddings, classes)
    second = kinship(kin, kin.embeddings[own], classes, own)
    related = Kinship(
        np.concatenate([first.index, second.index]),
        np.concatenate([first.weight, second.weight]),
        (*first.votes, *second.votes),
    )
    kept = np.union1d(related.index.ravel(), asked)
    kept, count = kept[kept >= 0], len(seen.rows)
    place = np.full(total + 1, -1)
    place[kept] = count + np.arange(len(kept))
    with_kin = np.concatenate([np.arange(count), place[asked]])
    return kept, place, related._replace(index=place[related.index]), with_kin


def _images(
    seen: Seen, said: _Said, kin: Kin, kept: Ints, doubt: Suspects, listed: Ints | None
) -> tuple[Images, float]:
    """The images, and the share of the variance that their map shows. listed: places of the training images in a list,
    which a map by t-SNE has; None without that map."""
    unlikely = unlike(kin, distance(nearest(kin, seen.embeddings, most=CLOSEST)))
    first = None if listed is None else np.concatenate([np.flatnonzero(~said.correct), listed])
    places, other, variance = _map(seen.embeddings, kin.embeddings[kept], first)
    unknown = np.full(len(seen.rows), np.nan, np.float32)
    nothing = np.full(len(kept), np.nan, np.float32)
    images = Images(
        evaluated=len(seen.rows),
        names=(
            *(seen.split.images.name(int(row)) for row in seen.rows),
            *(kin.names[row] for row in kept),
        ),
        labels=np.concatenate([seen.labels, kin.labels.numpy()[kept]]),
        predicted=np.concatenate([said.predicted, np.full(len(kept), -1)]),
        probability=np.concatenate([said.calibrated, nothing]),
        own=np.concatenate([said.own, nothing]),
        unlike=np.concatenate([unknown if unlikely is None else unlikely.numpy(), nothing]),
        suspicion=np.concatenate([unknown, doubt.votes[kept]], dtype=np.float32),
        other=np.concatenate(
            [np.full(len(seen.rows), -1), np.where(doubt.votes >= LEAST, doubt.other, -1)[kept]]
        ),
        places=places,
        other_places=other,
    )
    return images, variance


def _map(seen: Tensor, kept: Tensor, first: Ints | None) -> tuple[Floats, Floats | None, float]:
    """Places by PCA, by t-SNE where it is installed, and the share of the variance in the first. first: places that
    t-SNE takes before others; None: no t-SNE."""
    rows = torch.cat([F.normalize(seen.float(), dim=1), kept]).numpy()
    found, share = pca(rows)
    other = None
    if first is not None and has_tsne() and len(rows) >= 20:
        some = _for_tsne(len(seen), len(kept), first)
        other = np.full((len(rows), 2), np.nan, np.float32)
        found_there = tsne(rows[some])
        if not np.isfinite(found_there).all():  # as for equal embeddings
            return unit_square(found), None, share
        other[some] = unit_square(found_there)
    return unit_square(found), other, share


def _for_tsne(seen: int, kept: int, first: Ints) -> Ints:
    """The places that t-SNE shows, rising: of more than MOST_TSNE, half of each kind where both have as many; of each,
    those in `first`, then others evenly."""
    half = MOST_TSNE // 2
    found = []
    for start, count, most in (
        (0, seen, max(half, MOST_TSNE - kept)),
        (seen, kept, max(half, MOST_TSNE - seen)),
    ):
        every = np.arange(start, start + count)
        wanted, others = every[np.isin(every, first)], every[~np.isin(every, first)]
        wanted = wanted[_spread(len(wanted), most)]
        found += [wanted, others[_spread(len(others), most - len(wanted))]]
    return np.sort(np.concatenate(found))


def _smallest(values: Floats, among: NDArray[np.bool_]) -> Ints:
    """The places of the smallest values, the smallest first."""
    order = np.argsort(values, kind="stable")
    found: Ints = order[among[order]][:LISTED]
    return found


def _pairs(metrics: Metrics, images: Images) -> tuple[Pair, ...]:
    """The pairs of classes that are confused most often."""
    numbers = {each.name: number for number, each in enumerate(metrics.per_class)}
    wrong = [pair for pair in metrics.confusion if pair.true != pair.predicted]
    wrong.sort(key=lambda pair: -pair.images)
    found = []
    for pair in wrong[:PAIRS]:
        same = (images.labels == numbers[pair.true]) & (images.predicted == numbers[pair.predicted])
        places = np.flatnonzero(same)
        most_sure = np.argsort(-images.probability[places], kind="stable")[:EXAMPLES]
        found.append(Pair(*pair, places[most_sure]))
    return tuple(found)


def _order(
    images: Images, kin: Kinship, with_kin: Ints, first: Ints, correct: NDArray[np.bool_]
) -> Ints:
    """All places in `images`, those whose pictures matter most first: what is listed, errors, their kin, the rest."""
    row = np.full(len(images.names), -1)
    row[with_kin] = np.arange(len(with_kin))
    wrong, right = np.flatnonzero(~correct), np.flatnonzero(correct)
    # Images that are right, each with its nearest kin, so that the map has pictures everywhere.
    rest = np.column_stack([right, kin.index[right, :3]]).ravel()
    near = [kin.index[row[some]].ravel() for some in (first, wrong)]
    everything = np.concatenate(
        [first, near[0], wrong, near[1], rest, np.arange(len(images.names))]
    )
    known = everything[everything >= 0]
    _, where = np.unique(known, return_index=True)
    found: Ints = known[np.sort(where)]
    return found


def _sprite(
    wanted: Ints, seen: Seen, kin: Kin, kept: Ints, train: Split, names: tuple[str, ...]
) -> Sprite:
    """Pictures of the wanted images. cells: for each of all images, with their `names`."""
    rows = {train.images.name(row): row for row in range(len(train.labels))}
    count = len(seen.rows)
    sources, places = [], []
    for place in wanted.tolist():
        if place < count:
            sources.append((seen.split.images, int(seen.rows[place])))
        elif (row := rows.get(kin.names[kept[place - count]])) is not None:
            sources.append((train.images, row))
        else:
            continue
        places.append(place)
    # What long names take is left out of the pictures, so that the page keeps its size.
    longer = sum(
        max(0, len(name.rpartition("/")[2].encode(errors="replace")) - USUAL) for name in names
    )
    found = sprite(sources, largest=max(LARGEST // 4, LARGEST - longer))
    cells = np.full(len(names), -1)
    cells[places] = found.cells
    return found._replace(cells=tuple(cells.tolist()))
