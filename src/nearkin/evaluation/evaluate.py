"""Exact metrics of one trained model, or of several as an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nearkin.distributed import Runtime, choose_device
from nearkin.errors import ConfigError, printable
from nearkin.evaluation.ensemble import Answer, Jury, likelihood_weights, load_members, mixed
from nearkin.evaluation.metrics import summarise
from nearkin.evaluation.tta import COUNTS, Tta, unknown_tta
from nearkin.types import Predictions


def evaluate(
    run: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    *,
    split: str | None = None,
    tta: Tta = "none",
    weights: Literal["equal", "validation"] = "equal",
    cache: bool = True,
    device: str = "auto",
    workers: int = 0,
) -> dict[str, Any]:
    """Exact metrics of the model in a run folder, or of several as an ensemble: the mean of their probabilities.

    data: by default the runs' own, with the same splits. split: by default test, else val; the result names it.
    tta: none, flip or tencrop; the probabilities of the views are averaged. weights: of an ensemble, equal or those
    that minimise the log loss on the validation split, which no member was trained on. cache: keep what each model
    says of a split in its run folder.

    Raises ModelError when a run has no finished model or knows other classes, DataError when data or split do not
    fit its classes, ConfigError for options that do not fit together.
    """
    runs = [Path(run)] if isinstance(run, str | Path) else [Path(one) for one in run]
    if not runs:
        raise ConfigError("Evaluate which run? Give at least one run folder.")
    if weights not in ("equal", "validation"):
        raise ConfigError(f"--weights {printable(weights)} is none of equal, validation.")
    if tta not in COUNTS:
        raise unknown_tta(tta)
    with Runtime(device=choose_device(device), precision="fp32") as runtime:
        members = load_members(runs, runtime.device)
        jury = Jury(members, runtime, tta=tta, workers=workers, cache=cache)
        held = jury.ask_validation() if weights == "validation" and len(runs) > 1 else None
        answer = jury.ask(None if data is None else str(data), split)
        how = {"tta": tta, "weights": weights}
        return how | _report(jury, answer, _shares(held, len(runs)), _notes(answer, held))


def _shares(held: Answer | None, members: int) -> list[float]:
    """The weight of each member: equal, or what `held`, a split that none has seen, says."""
    if held is None:
        return [1 / members] * members
    labels = torch.from_numpy(held.found.split.labels)
    return likelihood_weights([one.probabilities for one in held.opinions], labels)


def _notes(answer: Answer, held: Answer | None) -> list[str]:
    """What a person should know, each thing once."""
    asked = [held, answer] if held is not None else [answer]
    notes = [*answer.found.notes]
    notes += [note for one in asked for opinion in one.opinions for note in opinion.notes]
    if held is not None and held.images == answer.images:
        notes.append(
            "the weights were chosen on this very split, so the ensemble's numbers flatter it; "
            "judge it on a test split or on other DATA"
        )
    return list(dict.fromkeys(notes))


def _report(
    jury: Jury, answer: Answer, shares: Sequence[float], notes: Sequence[str]
) -> dict[str, Any]:
    split = answer.found.split
    labels, index = torch.from_numpy(split.labels), torch.arange(len(split.labels))
    whole = mixed([one.probabilities for one in answer.opinions], shares)
    members = [
        {
            "run": str(member.run),
            "weight": share,
            "top1": summarise(Predictions(one.probabilities, labels, index), jury.classes)["top1"],
            "cached": one.cached,
        }
        for member, one, share in zip(jury.members, answer.opinions, shares, strict=True)
    ]
    head = {
        "run": str(jury.members[0].run),
        "split": split.name,
        "notes": list(notes),
        "members": members,
    }
    return head | summarise(Predictions(whole, labels, index), jury.classes)
