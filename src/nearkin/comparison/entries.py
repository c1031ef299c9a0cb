"""What is compared: an objective, a cheap rival of cross-entropy, or an objective with other options. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nearkin.catalogue import objectives, unknown_objective
from nearkin.config import RunConfig
from nearkin.errors import ConfigError, printable
from nearkin.hints import unknown_option

BASELINE = "ce"
RIVALS = {"ls": "label smoothing", "ema": "an averaged copy of the weights"}
SMOOTHING = 0.1  # of `ce+ls`
# Options that no run of a comparison takes. With --autotune the stopwatch of each run would choose its precision.
REFUSED = frozenset({"objective", "autotune", "log", "log_every", "log_level"})
# Options that are the same for all: what a run learns from, for how long, and where it is.
SHARED = REFUSED | {
    *("data", "options", "model_options", "seed", "epochs", "minutes", "val_split", "split_seed"),
    *("images_per_class", "bad_images", "check", "batch_size", "out", "save_minutes", "device"),
    *("threads", "workers"),
}


class Entry(NamedTuple):
    """name: as it was given, unique. objective: its registered name. rival: of RIVALS, or empty. options: flat, as in
    YAML, beside those of the comparison."""

    name: str
    objective: str
    rival: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name as a part of a path."""
        return re.sub(r"[^A-Za-z0-9.+]+", "-", self.name)

    @property
    def of_the_run(self) -> dict[str, Any]:
        """The options that are not the objective's."""
        return {k: v for k, v in self.options.items() if not k.startswith("objective.")}


def parse(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries of `NAME[+ls|+ema][:OPTION=VALUE]...`, cross-entropy first: it is added where it is missing.

    An option is the objective's own, else one of the run.

    Raises ConfigError for an unknown objective, rival or option, and for two entries that are the same.
    """
    words = [word.strip() for word in names if word.strip()]
    if BASELINE not in words:
        words.insert(0, BASELINE)
    words.sort(key=lambda word: word != BASELINE)
    entries = tuple(_entry(word) for word in words)
    folders = [entry.folder.casefold() for entry in entries]
    for entry in entries:
        if folders.count(entry.folder.casefold()) > 1:
            raise ConfigError(f"{printable(entry.name)} is given twice; give it once.")
    if len(entries) < 2:
        raise ConfigError(
            f"There is nothing to compare {BASELINE} with; give --objectives {BASELINE},supcon or others."
        )
    return entries


def _entry(word: str) -> Entry:
    head, *settings = word.split(":")
    objective, plus, rival = head.partition("+")
    if objective not in objectives():
        loaded = sys.modules.get("nearkin.objectives")
        if loaded is not None and objective in loaded.Objective.registry:
            raise ConfigError(
                f"The runs of a comparison are processes of their own, which do not have {printable(objective)}; "
                "install the package that defines it, with an entry point in nearkin.objectives."
            )
        raise unknown_objective(objective, objectives())
    if plus and (rival not in RIVALS or objective != BASELINE):
        raise ConfigError(
            f"Unknown {printable(head)}; the rivals of {BASELINE} are "
            f"{' and '.join(f'{BASELINE}+{name} ({what})' for name, what in RIVALS.items())}."
        )
    options: dict[str, Any] = dict(_setting(objective, setting, word) for setting in settings)
    if rival == "ls":
        options.setdefault("objective.smoothing", SMOOTHING)
    return Entry(word, objective, rival, options)


def _setting(objective: str, setting: str, word: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    name = name.replace("-", "_")
    if not (name and equals and value):
        raise ConfigError(
            f"{printable(word)} is not valid: after the objective give :OPTION=VALUE, such as "
            "supcon:weight=1."
        )
    own = objectives()[objective].options
    if own is None or name in own:
        return f"objective.{name}", value
    if name in SHARED:
        raise ConfigError(
            f"{printable(word)} is not fair: --{name.replace('_', '-')} is the same for all objectives."
        )
    if name not in RunConfig.model_fields:
        raise unknown_option(name, _known(own), prefix="")
    return name, value


def _known(own: Iterable[str]) -> list[str]:
    return [*own, *(name for name in RunConfig.model_fields if name not in SHARED)]
