"""DATA to splits that share one numbering of the classes, checked and ready to load."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.decode import BadImage, check_channels
from nearkin.data.images import ImageSource
from nearkin.data.look import BadImages, scan
from nearkin.data.sampling import keyed_rng
from nearkin.data.sources.listing import SPLITS, ListedSplit, Listing, by_bytes
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError, counted, listed, printable

Labels = NDArray[np.int64]


def stratified(labels: Labels, fraction: float, seed: int) -> NDArray[np.int64]:
    """The sorted rows to hold out: floor(fraction N) of N, but at least 1, shared among the classes.

    labels: `[N]`. Class c of n_c images gives floor(fraction n_c); what is left goes to the largest
    remainders, ties in a random order. At least one image of every class stays, so a class with one image
    gives none, and the result is empty when every class has only one. Source: our choice.
    """
    rng = keyed_rng("held out", seed)
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quota = _quota(counts, fraction, rng.permutation(len(counts)))
    return _first_of_each(place, quota, rng.permutation(len(labels)))


def limited(labels: Labels, most: int, seed: int) -> NDArray[np.int64]:
    """The sorted rows to keep so that no class has more than `most`, chosen at random. labels: `[N]`."""
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rng = keyed_rng("images per class", seed)
    return _first_of_each(place, np.minimum(counts, most), rng.permutation(len(labels)))


def _quota(counts: Labels, fraction: float, order: Labels) -> NDArray[np.int64]:
    """How many images each class gives. order: of the classes, where remainders tie."""
    room = counts - 1
    wanted = fraction * counts
    quota: NDArray[np.int64] = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), room)
    total = min(max(1, int(fraction * counts.sum() + 1e-9)), int(room.sum()))
    while (left := total - int(quota.sum())) > 0:
        by_remainder = order[np.argsort((quota - wanted)[order], kind="stable")]
        quota[by_remainder[(quota < room)[by_remainder]][:left]] += 1
    return quota


def _first_of_each(place: Labels, quota: Labels, shuffled: Labels) -> NDArray[np.int64]:
    """The sorted first `quota[c]` rows of each class c, in the order of `shuffled`."""
    grouped = shuffled[np.argsort(place[shuffled], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(quota)))])
    chosen = [grouped[start : start + n] for start, n in zip(starts, quota, strict=False)]
    return np.sort(np.concatenate(chosen)) if chosen else grouped


BadPolicy = Literal["error", "skip"]


class Split(NamedTuple):
    """Images with their class numbers. labels: `[N]`, places in the data set's classes."""

    name: str
    images: ImageSource
    labels: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Split:
        """The split with only `rows`, in that order."""
        return Split(self.name, self.images.take(rows), self.labels[rows])


class Dataset(NamedTuple):
    """What a run trains and is judged on.

    classes: sorted by their bytes; a label is a place in them, in every split.
    splits: `train` always, `val` and `test` if there.
    fingerprint: SHA-256 of all splits: names, sizes (of arrays: pixels) and classes of their images, in order.
    notes: what a person should know. bad: the images left out.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    channels: int
    fingerprint: str
    notes: tuple[str, ...]
    bad: tuple[BadImage, ...]


class Readable(NamedTuple):
    """A listing without its bad images, and these."""

    listing: Listing
    bad: tuple[BadImage, ...]


def load_dataset(
    data: str,
    *,
    channels: int | Literal["auto"] = "auto",
    val_split: float = 0.1,
    seed: int = 0,
    images_per_class: int | None = None,
    bad_images: BadPolicy = "error",
    classes: tuple[str, ...] | None = None,
    workers: int = 2,
    scan: bool = True,
) -> Dataset:
    """The splits of DATA (see `nearkin.data.sources.resolve`) for training.

    channels: 1 or 3; auto is 1 for grey arrays and 3 for all else. val_split: share of train to hold out,
    stratified, where the source has no val split; 0 = none. seed: of that choice and of `images_per_class`,
    the most training images of a class, applied after it. bad_images: whether an unreadable image stops
    everything or is left out. classes: of a run to go on with; those of the data must be among them.
    workers: threads that decode every image once; scan: False trusts the files.

    Raises BadImages (a DataError) for unreadable images; DataError for data that are missing or empty, for
    less than two classes, a class that train does not have, or no image to hold out; ConfigError for
    another number of channels.
    """
    listing = resolve(data)
    require(listing, "train", data)
    readable = read_all(listing, channels, bad_images, workers if scan else None)
    parts = readable.listing.parts
    names = tuple(by_bytes(set(parts["train"].present()))) if classes is None else classes
    if len(names) < 2:
        raise DataError(
            f"The data {printable(data)} have one class only, {listed(names)}; training needs two."
        )
    splits = {split: to_split(split, parts[split], names) for split in SPLITS if split in parts}
    splits = hold_out(splits, val_split, seed)
    notes = [*readable.listing.notes, *_class_notes(splits, names)]
    if images_per_class is not None:
        notes += _short_classes(splits["train"], names, images_per_class)
        splits = limit(splits, images_per_class, seed)
    return Dataset(
        name=listing.name,
        classes=names,
        splits=splits,
        channels=splits["train"].images.channels,
        fingerprint=_fingerprint(splits, names),
        notes=tuple(notes),
        bad=readable.bad,
    )


def require(listing: Listing, split: str, data: str) -> None:
    """Raises DataError, naming the splits there are, when `split` is not one."""
    if split not in listing.parts:
        raise DataError(
            f"The data {printable(data)} have no split {printable(split)}, only {', '.join(listing.parts)}."
        )


def read_all(
    listing: Listing, channels: int | Literal["auto"], policy: BadPolicy, workers: int | None
) -> Readable:
    """Decode everything in `workers` threads (None: nothing) and leave out what cannot be read.

    Raises BadImages when the policy is `error`, DataError when train is empty afterwards.
    """
    if channels == "auto":
        channels = next(iter(listing.parts.values())).images.channels
    check_channels(channels)
    parts: dict[str, ListedSplit] = {}
    bad: list[BadImage] = []
    for name, part in listing.parts.items():
        images = part.images.with_channels(channels)
        found = {} if workers is None else scan(images, workers=workers)
        bad += found.values()
        good = np.setdiff1d(np.arange(len(images)), list(found))
        converted = ListedSplit(images, part.labels, part.classes)
        parts[name] = converted.take(good) if found else converted
    if bad and policy == "error":
        raise BadImages.found(bad, sum(len(part.images) for part in listing.parts.values()))
    empty = [name for name, part in parts.items() if len(part.images) == 0]
    if empty:
        raise DataError(
            f"No image of the split {empty[0]} can be read; see {listed([bad[0].path])}."
        )
    left_out = (f"{counted(len(bad), 'unreadable image')} left out",) if bad else ()
    return Readable(Listing(listing.name, parts, (*listing.notes, *left_out)), tuple(bad))


def to_split(name: str, part: ListedSplit, classes: tuple[str, ...]) -> Split:
    """The part with labels as places in `classes`. Raises DataError for a class that is not among them."""
    unknown = [known for known in part.present() if known not in set(classes)]
    if unknown:
        raise DataError(
            f"The split {name} has {counted(len(unknown), 'class', 'classes')} that the training has not: "
            f"{listed(unknown)}; a model can only tell the classes it was trained on."
        )
    places = {known: place for place, known in enumerate(classes)}
    table = np.array([places.get(known, -1) for known in part.classes], dtype=np.int64)
    return Split(name, part.images, table[part.labels])


def hold_out(splits: Mapping[str, Split], val_split: float, seed: int) -> dict[str, Split]:
    """The splits with a val split: their own, or a share of train; none where `val_split` is 0.

    Raises DataError when every class has a single image, so that none can be spared.
    """
    if "val" in splits or val_split == 0:
        return dict(splits)
    train = splits["train"]
    held = stratified(train.labels, val_split, seed)
    if len(held) == 0:
        raise DataError(
            "No class has two training images, so none can be held out for validation; "
            "use --val-split 0 or give a val split."
        )
    kept = np.setdiff1d(np.arange(len(train.labels)), held)
    made = {"train": train.take(kept), "val": train.take(held)._replace(name="val")}
    return made | {name: split for name, split in splits.items() if name not in made}


def limit(splits: Mapping[str, Split], most: int, seed: int) -> dict[str, Split]:
    """The splits with at most `most` training images of each class."""
    train = splits["train"]
    return {**splits, "train": train.take(limited(train.labels, most, seed))}


def missing_classes(split: Split, classes: tuple[str, ...]) -> list[str]:
    """A note about the classes that have no image in the split, if there are any."""
    counts = np.bincount(split.labels, minlength=len(classes))
    absent = [classes[place] for place in np.flatnonzero(counts == 0)]
    if not absent:
        return []
    number = counted(len(absent), "class has", "classes have")
    return [f"{number} no image in the split {split.name}: {listed(absent)}"]


def _class_notes(splits: Mapping[str, Split], classes: tuple[str, ...]) -> list[str]:
    notes = [note for split in splits.values() for note in missing_classes(split, classes)]
    single = [classes[place] for place in np.flatnonzero(np.bincount(splits["train"].labels) == 1)]
    if single:
        number = counted(len(single), "class has", "classes have")
        notes.append(f"{number} a single training image: {listed(single)}")
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name.strip()).casefold(), []).append(name)
    notes += [
        f"class names that differ only in case, spaces or Unicode form: {listed(names)}"
        for names in alike.values()
        if len(names) > 1
    ]
    return notes


def _short_classes(train: Split, classes: tuple[str, ...], most: int) -> list[str]:
    counts = np.bincount(train.labels, minlength=len(classes))
    short = [f"{classes[place]} ({counts[place]})" for place in np.flatnonzero(counts < most)]
    if not short:
        return []
    number = counted(len(short), "class has", "classes have")
    return [f"{number} fewer than {most} training images: {listed(short)}"]


def _fingerprint(splits: Mapping[str, Split], classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for split in splits.values():
        for row, label in enumerate(split.labels):
            label_name = classes[label].encode("utf-8", "surrogateescape")
            fields = (split.name.encode(), split.images.identity(row), label_name)
            for field in fields:  # with their lengths, so that no two lists of fields look alike
                digest.update(b"%d:" % len(field) + field)
    return digest.hexdigest()


class EvaluationSplit(NamedTuple):
    """A split to evaluate a model on. notes: what a person should know. bad: the images left out."""

    split: Split
    notes: tuple[str, ...]
    bad: tuple[BadImage, ...]


def load_for_evaluation(
    data: str,
    *,
    classes: tuple[str, ...],
    channels: int,
    split: str | None = None,
    own: bool = True,
    val_split: float = 0.1,
    seed: int = 0,
    images_per_class: int | None = None,
    bad_images: BadPolicy = "error",
    workers: int = 2,
) -> EvaluationSplit:
    """One split of DATA. split: by default test, else val.

    own: DATA is what the model was trained on; then `val_split`, `seed` and `images_per_class` of that run
    give its very splits again. Other data without splits are one split, test, as a whole.
    classes: of the model; only those that the chosen split has need to be among them.

    Raises BadImages for unreadable images under the policy `error`; DataError when the split is not there
    or has a class that the model does not know.
    """
    listing = resolve(data)
    if not own and tuple(listing.parts) == ("train",):
        listing = listing._replace(parts={"test": listing.parts["train"]})
    carved = own and "val" not in listing.parts and "train" in listing.parts and val_split > 0
    there = [name for name in SPLITS if name in listing.parts or (carved and name == "val")]
    chosen = _choose(split, there, data)
    source = "train" if carved and chosen == "val" else chosen
    readable = read_all(_only(listing, source), channels, bad_images, workers)
    splits = {source: to_split(source, readable.listing.parts[source], classes)}
    if carved and source == "train":
        splits = hold_out(splits, val_split, seed)
    if own and chosen == "train" and images_per_class is not None:
        splits = limit(splits, images_per_class, seed)
    found = splits[chosen]
    notes = (*readable.listing.notes, *missing_classes(found, classes))
    return EvaluationSplit(found, notes, readable.bad)


def _choose(split: str | None, there: list[str], data: str) -> str:
    if split is None:
        split = next((name for name in ("test", "val") if name in there), None)
        if split is None:
            raise DataError(
                f"The data {printable(data)} have neither a test nor a val split; "
                "use --split train, or give other data."
            )
    if split not in there:
        raise DataError(
            f"The data {printable(data)} have no split {printable(split)}, only {', '.join(there)}."
        )
    return split


def _only(listing: Listing, split: str) -> Listing:
    """Just one split, so that nothing else is decoded."""
    return listing._replace(parts={split: listing.parts[split]})
