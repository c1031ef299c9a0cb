"""Files of a run that a test replaces."""

from __future__ import annotations

import hashlib
import json


def as_saved(run):
    """Let model.json take the files for those that were saved with it."""
    description = json.loads((run / "model.json").read_text())
    for name in description["digests"]:
        description["digests"][name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    (run / "model.json").write_text(json.dumps(description))
