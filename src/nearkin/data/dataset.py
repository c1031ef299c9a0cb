"""DATA to splits that share one numbering of the classes, checked and ready to load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.data.classes import class_remarks, folded, missing_classes, short
from nearkin.data.decode import BadImage
from nearkin.data.images import Files, ImageSource, open_images
from nearkin.data.look import ALONE, BadImages, Check, Ranks, look
from nearkin.data.sampling import keyed_rng
from nearkin.data.sources.listing import SPLITS, Listing, by_bytes
from nearkin.data.sources.resolve import resolve
from nearkin.errors import DataError, counted, listed, printable

Labels = NDArray[np.int64]


def stratified(labels: Labels, fraction: float, seed: int) -> NDArray[np.int64]:
    """The sorted rows to hold out: floor(fraction N) of N, but at least 1, shared among the classes.

    labels: `[N]`. Class c of n_c images gives floor(fraction n_c); what is left goes to the largest
    remainders, ties in a random order. At least one image of every class stays, so a class with one image
    gives none, and the result is empty when every class has only one.
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
    """Images with their class numbers. labels: `[N]`, places in `classes`."""

    name: str
    images: ImageSource
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()

    def take(self, rows: NDArray[np.int64]) -> Split:
        """The split with only `rows`, in that order."""
        return self._replace(images=self.images.take(rows), labels=self.labels[rows])

    def present(self) -> list[str]:
        """The classes that have an image here, sorted by their bytes."""
        return by_bytes(self.classes[place] for place in np.unique(self.labels))


class Dataset(NamedTuple):
    """What a run trains on and is evaluated on.

    splits: `train`, and `val` and `test` if there. `choose` leaves each with classes of its own, `numbered` gives them
    those of the run. notes: for the user. bad: the images left out.
    """

    name: str
    splits: dict[str, Split]
    notes: tuple[str, ...] = ()
    bad: tuple[BadImage, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of train: of a numbered data set, sorted by their bytes, or those of the run to go on with."""
        return self.splits["train"].classes

    @property
    def files(self) -> dict[str, Files]:
        """The splits whose images are files."""
        sources = {name: split.images for name, split in self.splits.items()}
        return {name: images for name, images in sources.items() if isinstance(images, Files)}

    @property
    def channels(self) -> int:
        """Of every image: 1 or 3."""
        return self.splits["train"].images.channels

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all splits: names, sizes (of arrays: pixels) and classes of their images, in order. Computed at
        each access: it asks the file system for the size of every file."""
        digest = hashlib.sha256()
        for split in self.splits.values():
            for label, image in zip(split.labels.tolist(), split.images.identities(), strict=True):
                label_name = self.classes[label].encode("utf-8", "surrogateescape")
                digest.update(framed(split.name.encode(), image, label_name))
        return digest.hexdigest()


def load_dataset(
    data: str | Listing,
    *,
    channels: int | Literal["auto"] = "auto",
    val_split: float = 0.1,
    split_seed: int | None = None,
    seed: int = 0,
    images_per_class: int | None = None,
    bad_images: BadPolicy = "error",
    classes: tuple[str, ...] | None = None,
    check: Check | None = "auto",
) -> Dataset:
    """The splits of DATA (see `nearkin.data.sources.resolve`) for training.

    channels, val_split, split_seed, seed, images_per_class: see `choose`. check: how files are looked at (see `look`);
    None trusts them. bad_images: whether an unreadable image stops everything or is left out. classes: of a run to go
    on with; those of the data must be among them.

    Raises BadImages (a DataError) for unreadable images; DataError for data that are missing or empty, for
    less than two classes, a class that train does not have, or no image to hold out; ConfigError for
    another number of channels.
    """
    listing = resolve(data) if isinstance(data, str) else data
    chosen = choose(
        listing,
        channels=channels,
        val_split=val_split,
        split_seed=split_seed,
        seed=seed,
        images_per_class=images_per_class,
    )
    dataset = numbered(chosen, classes)  # classes that do not fit are reported before the look
    return dataset if check is None else numbered(looked(chosen, check, bad_images), classes)


def choose(
    listing: Listing,
    *,
    channels: int | Literal["auto"],
    val_split: float,
    seed: int,
    images_per_class: int | None,
    split_seed: int | None = None,
) -> Dataset:
    """The images that a run uses.

    channels: 1 or 3; auto is 1 for grey arrays and 3 for all else. val_split: share of train to hold out,
    stratified, where the source has no val split; 0 = none. images_per_class: the most training images of a class,
    chosen after that. seed: of both choices; split_seed: of the first, where it is given.

    Raises DataError without a train split, and when every class has a single image, so that none can be held out.
    """
    _choose("train", list(listing.parts), listing.data)
    parts = hold_out(_opened(listing, channels), val_split, _split_seed(seed, split_seed))
    notes = listing.notes
    if images_per_class is not None:
        train = parts["train"]
        counts = np.bincount(train.labels)
        few = [
            f"{train.classes[c]} ({counts[c]})"
            for c in np.flatnonzero((counts > 0) & (counts < images_per_class))
        ]
        if few:
            number = counted(len(few), "class has", "classes have")
            notes += (f"{number} fewer than {images_per_class} training images: {listed(few)}",)
        parts["train"] = train.take(limited(train.labels, images_per_class, seed))
    return Dataset(listing.name, parts, notes)


def framed(*fields: bytes) -> bytes:
    """The fields with their lengths, so that no two lists of fields look alike."""
    return b"".join(b"%d:" % len(field) + field for field in fields)


def names_of(listing: Listing) -> str:
    """SHA-256 of the names and classes of the training images as they are listed, in order. Which of them are held out
    for validation, or kept by `images_per_class`, is the same as long as this is."""
    return _digest(
        listing,
        lambda images: (
            images.name(row).encode("utf-8", "surrogateescape") for row in range(len(images))
        ),
    )


def sizes_of(listing: Listing) -> str:
    """As `names_of`, with the sizes of the files, for which it asks the file system; of arrays with their pixels."""
    return _digest(listing, lambda images: images.identities())


def _digest(listing: Listing, field: Callable[[ImageSource], Iterable[bytes]]) -> str:
    digest = hashlib.sha256()
    if "train" in listing.parts:
        part = listing.parts["train"]
        images = open_images(part.images, "auto")
        for label, image in zip(part.labels.tolist(), field(images), strict=True):
            kind = part.classes[label].encode("utf-8", "surrogateescape")
            digest.update(framed(image, kind))
    return digest.hexdigest()


def looked(
    chosen: Dataset,
    check: Check,
    policy: BadPolicy,
    *,
    ranks: Ranks = ALONE,
    quiet: bool = True,
) -> Dataset:
    """Without the images that cannot be read (see `look`). Raises as `leave_out`."""
    found = look(chosen.files, check, ranks=ranks, quiet=quiet)
    return leave_out(chosen._replace(notes=(*chosen.notes, *found.notes)), found.bad, policy)


def leave_out(chosen: Dataset, reasons: Mapping[bytes, str], policy: BadPolicy) -> Dataset:
    """Without the bad files, absolute path -> what is wrong. No other image takes the place of one that is left out.

    Raises BadImages when the policy is `error`, DataError when a split is empty afterwards.
    """
    if not reasons:
        return chosen
    parts, problems = dict(chosen.splits), []
    for name, files in chosen.files.items():
        rows = [row for row in range(len(files)) if files.key(row) in reasons]
        problems += [BadImage(files.path(row), reasons[files.key(row)]) for row in rows]
        kept = np.setdiff1d(np.arange(len(files)), rows)
        if len(kept) == 0 and policy == "skip":
            first = problems[-len(rows)]
            raise DataError(
                f"No image of the split {name} can be read, such as {printable(first.path)} ({first.reason})."
            )
        parts[name] = parts[name].take(kept)
    if policy == "error":
        raise BadImages.found(problems, sum(len(part.labels) for part in chosen.splits.values()))
    note = f"{counted(len(problems), 'unreadable image')} left out"
    return chosen._replace(splits=parts, notes=(*chosen.notes, note), bad=tuple(problems))


def one_class(train: Split) -> str:
    """What is wrong with training images of one class only, in words. A folder around the classes looks like it."""
    names = train.present()
    text = f"have one class only, {listed(names)}; training needs two"
    inside = set()
    for row in range(len(train.labels)):
        *folders, _ = train.images.name(row).split("/")
        below = folders[folders.index(names[0]) + 1 :] if names[0] in folders else []
        if not below:
            return text
        inside.add(below[0])
    if len(inside) < 2:
        return text
    return f"{text}; if {listed(by_bytes(inside))} are the classes or splits, give the folder {listed(names)}"


def numbered(chosen: Dataset, classes: tuple[str, ...] | None) -> Dataset:
    """The data set with one numbering of the classes. classes: of a run to go on with; else those of train.

    Raises DataError for less than two classes and for a class that is not among them.
    """
    names = tuple(chosen.splits["train"].present()) if classes is None else classes
    if len(names) < 2:
        raise DataError(f"The data {printable(chosen.name)} {one_class(chosen.splits['train'])}.")
    ordered = [name for name in SPLITS if name in chosen.splits]
    splits = {name: to_split(chosen.splits[name], names) for name in ordered}
    remarks = (*missing_classes(splits["train"], names), *class_remarks(splits, names))
    notes = (*chosen.notes, *short(remarks))
    return chosen._replace(splits=splits, notes=notes)


def _opened(listing: Listing, channels: int | Literal["auto"]) -> dict[str, Split]:
    parts = {}
    for name, part in listing.parts.items():
        images = open_images(part.images, channels)
        channels = images.channels  # all splits as the first
        parts[name] = Split(name, images, part.labels, part.classes)
    return parts


def to_split(part: Split, classes: tuple[str, ...]) -> Split:
    """The part with labels as places in `classes`. Raises DataError for a class that is not among them."""
    places = {known: place for place, known in enumerate(classes)}
    unknown = [known for known in part.present() if known not in places]
    if unknown:
        near = {folded(known): known for known in classes}
        meant = next((near[folded(known)] for known in unknown if folded(known) in near), None)
        advice = "a model can only tell the classes it was trained on"
        if meant is not None:
            advice = (
                f"{printable(meant)} in the training differs only in case, spaces or Unicode form; "
                "give both the same name"
            )
        raise DataError(
            f"The split {part.name} has {counted(len(unknown), 'class', 'classes')} that the training has not: "
            f"{listed(unknown)}; {advice}."
        )
    table = np.array([places.get(known, -1) for known in part.classes], dtype=np.int64)
    return part._replace(labels=table[part.labels], classes=classes)


def _split_seed(seed: int, given: int | None) -> int:
    return seed if given is None else given


def hold_out(parts: Mapping[str, Split], val_split: float, seed: int) -> dict[str, Split]:
    """The parts with a val split: their own, or a share of train; none where `val_split` is 0.

    Raises DataError when every class has a single image, so that none can be spared.
    """
    if "val" in parts or val_split == 0:
        return dict(parts)
    train = parts["train"]
    held = stratified(train.labels, val_split, seed)
    if len(held) == 0:
        raise DataError(
            "No class has two training images, so none can be held out for validation; "
            "use --val-split 0 or give a val split."
        )
    kept = np.setdiff1d(np.arange(len(train.labels)), held)
    return {**parts, "train": train.take(kept), "val": train.take(held)._replace(name="val")}


class EvaluationSplit(NamedTuple):
    """A split to evaluate a model on. notes: what a person should know. bad: the images left out."""

    split: Split
    notes: tuple[str, ...]
    bad: tuple[BadImage, ...]


def load_for_evaluation(
    data: str | Listing,
    *,
    classes: tuple[str, ...],
    channels: int,
    split: str | None = None,
    own: bool = True,
    val_split: float = 0.1,
    split_seed: int | None = None,
    seed: int = 0,
    images_per_class: int | None = None,
    origin: str | None = None,
    bad_images: BadPolicy = "error",
    check: Check = "auto",
    ranks: Ranks = ALONE,
    quiet: bool = True,
) -> EvaluationSplit:
    """One split of DATA. split: by default test, else val.

    own: DATA is what the model was trained on; then `val_split`, `split_seed`, `seed` and `images_per_class` of that
    run give its very splits again, as long as `names_of` the data is still the run's `origin` (None: not known).
    Other data without splits are one split, test, as a whole.
    classes: of the model; only those that the chosen split has need to be among them.
    check, ranks, quiet: as in `look`; only images of the split are looked at.

    Raises BadImages for unreadable images under the policy `error`; DataError when the split is not there, has a class
    that the model does not know, or cannot be told from other images of the run.
    """
    listing = resolve(data) if isinstance(data, str) else data
    if not own and tuple(listing.parts) == ("train",):
        listing = _as_test(listing, split)
    carved = own and "val" not in listing.parts and "train" in listing.parts and val_split > 0
    there = [name for name in SPLITS if name in listing.parts or (carved and name == "val")]
    name = _choose(split, there, listing.data)
    if name != "test" and (carved or (own and name == "train" and images_per_class is not None)):
        _check_origin(listing, origin)
    parts = _opened(listing, channels)
    if carved and name in ("train", "val"):
        parts = hold_out(parts, val_split, _split_seed(seed, split_seed))
    if own and name == "train" and images_per_class is not None:
        train = parts["train"]
        parts["train"] = train.take(limited(train.labels, images_per_class, seed))
    chosen = Dataset(listing.name, {name: parts[name]}, listing.notes)
    chosen = looked(chosen, check, bad_images, ranks=ranks, quiet=quiet)
    found = to_split(chosen.splits[name], classes)
    absent = (remark.text for remark in missing_classes(found, classes))
    return EvaluationSplit(found, (*chosen.notes, *absent), chosen.bad)


def _as_test(listing: Listing, split: str | None) -> Listing:
    """Data without splits as one split, test. Raises DataError where another is asked for."""
    if split not in (None, "test"):
        raise DataError(f"The data {printable(listing.data)} have no splits; leave out --split.")
    return listing._replace(parts={"test": listing.parts["train"]})


def _check_origin(listing: Listing, origin: str | None) -> None:
    if origin not in (None, names_of(listing)):
        raise DataError(
            f"Training images of {printable(listing.data)} were added, removed or renamed since the run was trained, "
            "so those that it was trained on cannot be told from those held out for validation; put the files back, "
            "or evaluate other images."
        )


def _choose(split: str | None, there: list[str], data: str) -> str:
    if split is None:
        split = next((name for name in ("test", "val") if name in there), None)
        if split is None:
            raise DataError(
                f"The data {printable(data)} have neither a test nor a val split; give other data, or look at the "
                "training images with nearkin evaluate RUN --split train."
            )
    if split not in there:
        raise DataError(
            f"The data {printable(data)} have no split {printable(split)}, only {', '.join(there)}."
        )
    return split
