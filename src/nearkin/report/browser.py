"""The data of the map and the neighbour browser as compact JSON, and the images of a list as plain values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from nearkin.errors import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nearkin.evaluation.report_data import ReportData

FINE = 4096  # steps of a coordinate
UNSAFE = re.compile(r"[<>&]|[^\x00-\x7f]")


class Cell(NamedTuple):
    """Where a small picture is in the sprite."""

    column: int
    row: int


def page_data(data: ReportData, run: str) -> str:
    """What report.js reads, as JSON that can stand in an element of HTML. See the type `Data` there."""
    images, kin = data.images, data.kin
    folders: dict[str, int] = {}
    places, bases, raw = [], [], {}
    for number, name in enumerate(images.names):
        folder, slash, base = name.rpartition("/")
        places.append(folders.setdefault(printable(folder + slash), len(folders)))
        bases.append(printable(base))
        if printable(name) != name:
            raw[number] = name
    values: dict[str, Any] = {
        "run": printable(run),
        "root": data.root,
        "split": data.split,
        "classes": [printable(name) for name in data.classes],
        "rawClasses": {n: name for n, name in enumerate(data.classes) if printable(name) != name},
        "evaluated": images.evaluated,
        "attended": data.attended,
        "trained": data.trained,
        "folders": list(folders),
        "folder": places,
        "base": bases,
        "raw": raw,
        "label": images.labels.tolist(),
        "predicted": images.predicted[: images.evaluated].tolist(),
        "probability": _thousandths(images.probability[: images.evaluated]),
        "own": _thousandths(images.own[: images.evaluated]),
        "unlike": _thousandths(images.unlike[: images.evaluated]),
        "suspicion": _thousandths(images.suspicion[images.evaluated :]),
        "other": images.other[images.evaluated :].tolist(),
        "pca": _places(images.places),
        "tsne": None if images.other_places is None else _places(images.other_places),
        "cell": list(data.sprite.cells),
        "columns": data.sprite.columns,
        "withKin": data.with_kin.tolist(),
        "kin": kin.index.ravel().tolist(),
        "weight": _thousandths(kin.weight.ravel(), 10_000),
        "votes": [
            [n for v in votes for n in (v.label, round(1000 * v.share), round(1000 * v.without))]
            for votes in kin.votes
        ],
    }
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    """A character that could end the element, or that cannot be seen, as JSON escapes it."""
    character = found[0]
    if character in "<>&":
        return f"\\u{ord(character):04x}"
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _thousandths(values: NDArray[np.float32], parts: int = 1000) -> list[int]:
    """Whole thousandths, -1 for what is not known."""
    return [-1 if math.isnan(value) else round(parts * value) for value in values.tolist()]


def _places(places: NDArray[np.float32]) -> list[int]:
    """x, y, x, y, ... in steps of 1 / FINE."""
    return _thousandths(places.ravel(), FINE)


def cell(data: ReportData, place: int) -> Cell | None:
    """Of an image's picture; None where it has none."""
    number = data.sprite.cells[place]
    return None if number < 0 else Cell(number % data.sprite.columns, number // data.sprite.columns)


def cards(data: ReportData, places: Iterable[int]) -> list[dict[str, Any]]:
    """The images of a list, in words."""
    return [_card(data, int(place)) for place in places]


def _card(data: ReportData, place: int) -> dict[str, Any]:
    images = data.images
    label = data.classes[images.labels[place]]
    predicted = int(images.predicted[place])
    found: dict[str, Any] = {
        "place": place,
        "cell": cell(data, place),
        "label": label,
        "name": images.names[place],
        "split": data.split if place < images.evaluated else "train",
    }
    if predicted >= 0:
        sure = percent(float(images.probability[place]))
        right = predicted == images.labels[place]
        return found | {
            "title": f"{label}" if right else f"{label} taken for {data.classes[predicted]}",
            "text": f"{'right' if right else 'predicted'} with {sure}",
            "wrong": not right,
        }
    other = int(images.other[place])
    kin = data.classes[other] if other >= 0 else label
    return found | {
        "title": label,
        "text": f"its kin say {kin}, {percent(float(images.suspicion[place]))}",
        "wrong": True,
    }


def plain(value: object) -> str:
    """An option's value; numbers without the digits that rounding leaves."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def percent(share: float, decimals: int = 0) -> str:
    """`93 %`; never `100 %` for what is less, nor `0 %` for what is more than nothing."""
    step = 10.0 ** -(decimals + 2)
    if 1 - step / 2 <= share < 1:
        return f"> {100 * (1 - step):.{decimals}f} %"
    if 0 < share <= step / 2:
        return f"< {100 * step:.{decimals}f} %"
    return f"{100 * share:.{decimals}f} %"
