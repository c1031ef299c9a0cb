"""Using a trained model: exact metrics of a split, and classes of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nearkin.data import IMAGE_SUFFIXES, BadImage, Evaluation, eval_transform, read_image
from nearkin.errors import ConfigError, DataError, printable
from nearkin.evaluation.bundle import Bundle, load_bundle
from nearkin.evaluation.ensemble import likelihood_weights, mixed
from nearkin.evaluation.members import BATCH, Jury, Opinion, load_members
from nearkin.evaluation.metrics import summarise
from nearkin.evaluation.tta import Tta
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
    runtime = Runtime(device=choose_device(device), precision="fp32")
    try:
        members = load_members(runs, runtime.device)
        jury = Jury(members, runtime, tta=tta, workers=workers, cache=cache)
        shares = [1 / len(runs)] * len(runs)
        if weights == "validation" and len(runs) > 1:
            held, said = jury.ask(None, "val")
            labels = torch.from_numpy(held.split.labels)
            shares = likelihood_weights([one.probabilities for one in said], labels)
        found, opinions = jury.ask(None if data is None else str(data), split)
        return _report(jury, found, opinions, shares)
    finally:
        runtime.close()


def _report(
    jury: Jury, found: Evaluation, opinions: Sequence[Opinion], shares: Sequence[float]
) -> dict[str, Any]:
    labels = torch.from_numpy(found.split.labels)
    index = torch.arange(len(labels))
    whole = opinions[0].probabilities
    if len(opinions) > 1:
        whole = mixed([one.probabilities for one in opinions], shares)
    members = [
        {
            "run": str(member.run),
            "weight": share,
            "top1": summarise(Predictions(one.probabilities, labels, index), jury.classes)["top1"],
            "cached": one.cached,
        }
        for member, one, share in zip(jury.members, opinions, shares, strict=True)
    ]
    notes = [*found.notes, *(note for one in opinions for note in one.notes)]
    head = {
        "run": str(jury.members[0].run),
        "split": found.split.name,
        "notes": notes,
        "members": members,
    }
    return head | summarise(Predictions(whole, labels, index), jury.classes)


def predict(
    run: str | Path, paths: Iterable[str | Path], *, device: str = "auto"
) -> Iterator[Guess]:
    """The class of each image file, folders searched through; an unreadable file gives a Guess with `error`.

    Raises ModelError when `run` has no finished model, DataError when a path does not exist or holds no images.
    """
    chosen = torch.device(choose_device(device))
    bundle = load_bundle(Path(run), chosen)
    files = [file for path in paths for file in _files(Path(path))]
    parts = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    return (guess for part in parts for guess in _guesses(bundle, part, chosen))


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
def _guesses(bundle: Bundle, files: Sequence[Path], device: torch.device) -> Iterator[Guess]:
    spec = bundle.description.spec
    transform = eval_transform(bundle.description.transform)
    good, images, errors = [], [], {}
    for file in files:
        try:
            images.append(transform(read_image(file, channels=spec.channels)))
            good.append(file)
        except BadImage as error:
            errors[file] = error.reason
    rows = bundle.network(torch.stack(images).to(device)).logits if images else None
    probabilities = (
        {} if rows is None else dict(zip(good, rows.float().softmax(1).cpu(), strict=True))
    )
    for file in files:
        if file in errors:
            yield Guess(str(file), None, None, (), errors[file])
        else:
            yield _guess(file, probabilities[file], bundle.classes)


def _guess(file: Path, probabilities: torch.Tensor, classes: tuple[str, ...]) -> Guess:
    values, order = probabilities.topk(min(5, len(classes)))
    top5 = tuple((classes[c], v) for c, v in zip(order.tolist(), values.tolist(), strict=True))
    return Guess(str(file), top5[0][0], top5[0][1], top5)
