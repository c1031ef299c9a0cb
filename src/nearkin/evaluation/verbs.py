"""Using a trained model: exact metrics of a split, and classes of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nearkin.data import IMAGE_SUFFIXES, BadImage, read_image
from nearkin.errors import ConfigError, DataError, printable
from nearkin.evaluation.bundle import Bundle, load_bundle
from nearkin.evaluation.ensemble import likelihood_weights, mixed
from nearkin.evaluation.members import BATCH, Answer, Jury, load_members
from nearkin.evaluation.metrics import summarise
from nearkin.evaluation.predict import mean_probabilities
from nearkin.evaluation.tta import COUNTS, Tta, tta_views, unknown_tta
from nearkin.runtime import Runtime, choose_device
from nearkin.types import Predictions


class Guess(NamedTuple):
    """What the model says of one file; `error` says why it says nothing."""

    path: str
    label: str | None
    probability: float | None
    top5: tuple[tuple[str, float], ...]
    error: str = ""


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
    runtime = Runtime(device=choose_device(device), precision="fp32")
    try:
        members = load_members(runs, runtime.device)
        jury = Jury(members, runtime, tta=tta, workers=workers, cache=cache)
        held = jury.ask_validation() if weights == "validation" and len(runs) > 1 else None
        answer = jury.ask(None if data is None else str(data), split)
        how = {"tta": tta, "weights": weights}
        return how | _report(jury, answer, _shares(held, len(runs)), _notes(answer, held))
    finally:
        runtime.close()


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


def predict(
    run: str | Path,
    paths: Iterable[str | Path],
    *,
    tta: Tta = "none",
    device: str = "auto",
) -> Iterator[Guess]:
    """The class of each image file, folders searched through; an unreadable file gives a Guess with `error`.

    tta: as in `evaluate`.

    Raises ModelError when `run` has no finished model, DataError when a path does not exist or holds no images,
    ConfigError for other views.
    """
    if tta not in COUNTS:
        raise unknown_tta(tta)
    chosen = torch.device(choose_device(device))
    bundle = load_bundle(Path(run), chosen)
    size = BATCH // COUNTS[tta]
    files = [file for path in paths for file in _files(Path(path))]
    parts = (files[start : start + size] for start in range(0, len(files), size))
    return (guess for part in parts for guess in _guesses(bundle, part, tta, chosen))


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        if not os.path.lexists(path):
            raise DataError(f"{printable(str(path))} does not exist; give image files or folders.")
        yield path
        return
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    if not found:
        raise DataError(f"The folder {printable(str(path))} holds no images.")
    yield from found


@torch.inference_mode()
def _guesses(
    bundle: Bundle, files: Sequence[Path], tta: Tta, device: torch.device
) -> Iterator[Guess]:
    spec = bundle.description.spec
    views = tta_views(tta, bundle.description.transform)
    good, images, errors = [], [], {}
    for file in files:
        try:
            images.append(views(read_image(file, channels=spec.channels)))
            good.append(file)
        except BadImage as error:
            errors[file] = error.reason
    probabilities = {}
    if images:
        batch = torch.stack([view for same in zip(*images, strict=True) for view in same])
        rows = mean_probabilities(bundle.network(batch.to(device)).logits, len(good))
        probabilities = dict(zip(good, rows.cpu(), strict=True))
    for file in files:
        if file in errors:
            yield Guess(str(file), None, None, (), errors[file])
        else:
            yield _guess(file, probabilities[file], bundle.classes)


def _guess(file: Path, probabilities: torch.Tensor, classes: tuple[str, ...]) -> Guess:
    values, order = probabilities.topk(min(5, len(classes)))
    top5 = tuple((classes[c], v) for c, v in zip(order.tolist(), values.tolist(), strict=True))
    return Guess(str(file), top5[0][0], top5[0][1], top5)
