"""The choices of evaluate, predict and fewshot, checked before torch is imported."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal, get_args

from nearkin.config import CONFIG_FILE
from nearkin.errors import ConfigError, ModelError, nearest, printable

Tta = Literal["none", "flip", "tencrop"]
Weights = Literal["equal", "validation"]
Device = Literal["auto", "cpu", "cuda", "mps"]
BadPolicy = Literal["error", "skip"]

DESCRIPTION = "model.json"
EVIDENCE = "kin.safetensors"
IDENTITY = "identity.json"


def check_choice(option: str, value: object, choices: Any) -> None:
    """Raises ConfigError when `value` is not in the `Literal` type `choices`, and names the nearest choice."""
    known = get_args(choices)
    if value not in known:
        raise ConfigError(
            f"--{option} {printable(str(value))} is none of {', '.join(known)}.{nearest(str(value), known)}"
        )


def check_share(option: str, value: float | None) -> None:
    """Raises ConfigError unless `value` is None or between 0 and 1, both excluded."""
    if value is not None and not 0 < value < 1:
        usual = 0.95 if option == "sets" else 0.05
        raise ConfigError(
            f"--{option} {value:g} is not between 0 and 1; give a share such as {usual}."
        )


def check_run(run: Path) -> None:
    """Raises ModelError when `run` is not the folder of a finished run."""
    shown = printable(str(run))
    if (run / DESCRIPTION).is_file():
        return
    if (run / CONFIG_FILE).is_file():
        raise ModelError(
            f"The run {shown} has no finished model (no {DESCRIPTION}); let its training end first; if it was "
            f"stopped: nearkin train --resume {shlex.quote(shown)}"
        )
    if run.is_dir():
        problem = f"is no run folder: it has no finished model (no {DESCRIPTION})"
    else:
        problem = "is a file, not a run folder" if run.exists() else "does not exist"
    raise ModelError(f"The run {shown} {problem}; give the folder that train printed.")
