"""DATA for a model that is already trained: one split, numbered as the model numbers its classes."""

from __future__ import annotations

from typing import NamedTuple

from nearkin.data.dataset import (
    BadPolicy,
    Split,
    hold_out,
    limit,
    missing_classes,
    read_all,
    to_split,
)
from nearkin.data.decode import BadImage
from nearkin.data.listing import SPLITS, Listing
from nearkin.data.sources import resolve
from nearkin.errors import DataError, printable


class Evaluation(NamedTuple):
    """A split to judge a model on. notes: what a person should know. bad: the images left out."""

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
) -> Evaluation:
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
    return Evaluation(found, notes, readable.bad)


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
