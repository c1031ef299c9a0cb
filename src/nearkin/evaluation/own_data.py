"""Whether DATA are the images that a run was trained on, wherever they are now."""

from __future__ import annotations

import json
from pathlib import Path

from nearkin.data.dataset import origin_of
from nearkin.data.sources.builtin import BUILTIN
from nearkin.data.sources.listing import Listing
from nearkin.evaluation.options import IDENTITY


def stored_origin(run: Path) -> str | None:
    """`origin_of` the data that the run was trained on; None where it is not known."""
    try:
        found = json.loads((run / IDENTITY).read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(found)


def is_own(data: Listing, trained: str, origin: str | None) -> bool:
    """trained: the DATA of the run. Either it is the same place, or the training images have the same names and
    classes. A built-in name is not a folder of that name."""
    if data.data == trained:
        return True
    if data.data in BUILTIN or trained in BUILTIN:
        return False
    try:
        if Path(data.data).samefile(trained):
            return True
    except (OSError, ValueError):
        pass
    return "train" in data.parts and origin == origin_of(data)
