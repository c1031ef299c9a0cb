"""The outcome of a comparison: its runs, and what they say about each entry against cross-entropy."""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearkin.comparison.plan import Job, Terms
from nearkin.comparison.statistics import (
    LEAST_SEEDS,
    Adjusted,
    Effect,
    balancing,
    effect,
    holm,
    verdict,
)
from nearkin.errors import ModelError, printable
from nearkin.evaluation.metrics import SMALLEST
from nearkin.training.metrics_log import METRICS, read_metrics
from nearkin.training.run_folder import stored_settings, stored_state

State = Literal["finished", "failed", "waiting"]
Measure = Literal["top1", "balanced", "log_loss"]
MEASURES: tuple[Measure, ...] = ("top1", "balanced", "log_loss")
# Differences up to this do not matter, and that in words.
SAME: dict[Measure, tuple[float, str]] = {
    "top1": (0.005, "0.5 points"),
    "balanced": (0.005, "0.5 points"),
    "log_loss": (0.01, "0.01"),
}


UNTRAINED = "no verdict: a run trained no epoch"


class Scores(NamedTuple):
    """Of each test image, in the order of the split. paths, labels, predicted: of its file and classes.
    probability: `[m]` of its label."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    probability: NDArray[np.float64]

    @property
    def correct(self) -> NDArray[np.float64]:
        """`[m]`, 1 where the prediction is the label."""
        return np.array([a == b for a, b in zip(self.labels, self.predicted, strict=True)], float)

    @property
    def log_likelihood(self) -> NDArray[np.float64]:
        """`[m]`, in nats."""
        logs: NDArray[np.float64] = np.log(np.maximum(self.probability, SMALLEST))
        return logs

    @property
    def weights(self) -> NDArray[np.float64]:
        """`[m]`, see `balancing`."""
        return balancing(np.unique(self.labels, return_inverse=True)[1])

    def of(self, measure: Measure) -> NDArray[np.float64]:
        """`[m]`, more is better."""
        if measure == "log_loss":
            return self.log_likelihood
        return self.correct * self.weights if measure == "balanced" else self.correct


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. error: why it failed. The other values are None until it is finished.

    top1, balanced, log_loss: on the test split. seconds: of training, validation included. crops_per_second: through
    the student, without validation. memory: bytes at most. epochs: that it trained. curve: crops so far and the
    validation value.
    """

    entry: str
    seed: int
    folder: str
    state: State
    error: str | None = None
    top1: float | None = None
    balanced: float | None = None
    log_loss: float | None = None
    seconds: float | None = None
    crops_per_second: float | None = None
    memory: int | None = None
    epochs: int | None = None
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """An entry against cross-entropy in one measure.

    difference: more is better, for the log loss too. interval: of 95 % confidence, for this comparison alone. p_value:
    adjusted for the number of comparisons by Holm. verdict: in words. wins: seeds with a difference above 0.
    """

    entry: str
    measure: Measure
    difference: float
    interval: tuple[float, float]
    p_value: float
    verdict: str
    wins: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs of a comparison, and each entry against cross-entropy.

    folder: where everything is. baseline: the entry that the others are compared with. images: of the test split.
    equal: what was held equal, in words. contrasts: of every entry, over the seeds that it and the baseline have
    finished. classes: accuracy of each class, entry -> class -> mean over seeds. picked: the entry that
    `pick` chose, and its run folder.
    """

    folder: Path
    data: str
    baseline: str
    seeds: int
    images: int
    equal: dict[str, str]
    weights: dict[str, int]
    crops: dict[str, int | None]
    runs: tuple[Run, ...]
    contrasts: tuple[Contrast, ...]
    classes: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()
    picked: tuple[str, str] | None = None

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.entry for run in self.runs))

    def finished(self, entry: str) -> list[Run]:
        """The finished runs of an entry."""
        return [run for run in self.runs if run.entry == entry and run.state == "finished"]

    def contrast(self, entry: str, measure: Measure = "top1") -> Contrast | None:
        """An entry against the baseline; None for the baseline itself, and where too few runs are finished."""
        found = (c for c in self.contrasts if (c.entry, c.measure) == (entry, measure))
        return next(found, None)

    def verdict(self, entry: str, measure: Measure = "top1") -> str:
        """What may be said of `entry` against the baseline. Raises ValueError for a name that was not compared."""
        if entry not in self.entries or entry == self.baseline:
            others = ", ".join(name for name in self.entries if name != self.baseline)
            raise ValueError(f"{entry} was not compared with {self.baseline}; there are: {others}.")
        found = self.contrast(entry, measure)
        return f"no verdict: {LEAST_SEEDS} seeds are the least" if found is None else found.verdict

    def table(self) -> list[dict[str, Any]]:
        """One row of plain values for each entry: means over finished runs, and the contrast of top-1."""
        return [self._row(name) for name in self.entries]

    def _row(self, entry: str) -> dict[str, Any]:
        runs, found = self.finished(entry), self.contrast(entry)
        failed = sum(run.entry == entry and run.state == "failed" for run in self.runs)
        return {
            "entry": entry,
            "runs": len(runs),
            "failed": failed,
            "top1": _mean([run.top1 for run in runs]),
            "top1_std": _std([run.top1 for run in runs]),
            "balanced": _mean([run.balanced for run in runs]),
            "log_loss": _mean([run.log_loss for run in runs]),
            "difference": found and found.difference,
            "low": found and found.interval[0],
            "high": found and found.interval[1],
            "verdict": self.verdict(entry) if entry != self.baseline else "",
            "wins": found and found.wins,
            "compared": found and found.seeds,
            "crops_per_second": _mean([run.crops_per_second for run in runs]),
            "seconds": _mean([run.seconds for run in runs]),
            "memory": max((run.memory or 0 for run in runs), default=0) or None,
            "weights": self.weights.get(entry),
            "crops": self.crops.get(entry),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": str(self.folder),
            "data": self.data,
            "baseline": self.baseline,
            "seeds": self.seeds,
            "images": self.images,
            "equal": self.equal,
            "table": self.table(),
            "contrasts": [
                vars(each) | {"interval": list(each.interval)} for each in self.contrasts
            ],
            "runs": [vars(run) | {"curve": [list(p) for p in run.curve]} for run in self.runs],
            "classes": self.classes,
            "notes": list(self.notes),
            "picked": self.picked and {"entry": self.picked[0], "run": self.picked[1]},
        }


def collect(
    folder: Path,
    terms: Sequence[Terms],
    jobs: Sequence[Job],
    *,
    data: str,
    equal: dict[str, str],
    notes: Sequence[str] = (),
) -> Comparison:
    """What the run folders in `folder`/runs say now. Raises ModelError where two runs tested different images."""
    runs, scores = [], dict[tuple[str, int], Scores]()
    by_name = {each.entry.name: each for each in terms}
    for job in jobs:
        place = folder / "runs" / job.name
        name, seed = job.entry.name, job.seed
        if stored_state(place) == "finished":
            scores[name, seed], run = _read(place, by_name[name], seed)
            runs.append(run)
        else:
            error = _text(place.with_name(f"{place.name}.error"))
            state: State = "waiting" if error is None else "failed"
            path = f"runs/{job.name}"
            runs.append(Run(entry=name, seed=seed, folder=path, state=state, error=error))
    _check_same_images(scores)
    baseline = terms[0].entry.name
    idle = sorted({run.entry for run in runs if run.epochs == 0})
    told = list(notes)
    if idle:
        told.append(
            f"{', '.join(idle)}: a run without an epoch is its probe; give more time or epochs"
        )
    common = _common_seeds(scores)
    if any(seed not in common for _, seed in scores):
        told.append("means are over the finished seeds of each entry, differences over common ones")
    return Comparison(
        folder=folder,
        data=data,
        baseline=baseline,
        seeds=len({job.seed for job in jobs}),
        images=len(next(iter(scores.values())).labels) if scores else 0,
        equal=equal,
        weights={each.entry.name: each.weights for each in terms},
        crops={n: each.epochs and each.crops(each.epochs) for n, each in by_name.items()},
        runs=tuple(runs),
        contrasts=tuple(contrasts(scores, baseline, idle=idle)),
        classes=_classes({key: found for key, found in scores.items() if key[1] in common}),
        notes=tuple(told),
    )


def contrasts(
    scores: dict[tuple[str, int], Scores], baseline: str, *, idle: Collection[str] = ()
) -> list[Contrast]:
    """Every other entry against `baseline`, in each measure, over the seeds that both have; at least two seeds.

    idle: entries of which a run trained no epoch. They get no verdict, as those of fewer than LEAST_SEEDS seeds, and
    their p values do not count among those that Holm adjusts.
    """
    found = []
    names = dict.fromkeys(name for name, _ in scores if name != baseline)
    for measure in MEASURES:
        effects: dict[str, tuple[Effect, NDArray[np.float64]]] = {}
        balanced = measure == "balanced"
        for name in names:
            seeds = sorted(s for n, s in scores if n == name and (baseline, s) in scores)
            if len(seeds) < 2:
                continue
            first, second = (
                np.stack([scores[which, seed].of(measure) for seed in seeds])
                for which in (baseline, name)
            )
            largest = float(scores[name, seeds[0]].weights.max()) if balanced else 1.0
            effects[name] = effect(first, second, largest), (second - first).mean(1)
        untrained = {name for name in effects if {name, baseline} & set(idle)}
        adjusted = {name: Adjusted(each.p_value, 1) for name, (each, _) in effects.items()}
        adjusted |= holm(
            {
                name: each.p_value
                for name, (each, _) in effects.items()
                if each.seeds >= LEAST_SEEDS and name not in untrained
            }
        )
        same, within = SAME[measure]
        for name, (each, by_seed) in effects.items():
            words = verdict(each, adjusted[name], same=same, within=within)
            if name in untrained:
                words = UNTRAINED
            found.append(
                Contrast(
                    entry=name,
                    measure=measure,
                    difference=each.difference,
                    interval=each.interval(),
                    p_value=adjusted[name].p,
                    verdict=words,
                    wins=int((by_seed > 0).sum()),
                    seeds=each.seeds,
                )
            )
    return found


def _read(place: Path, term: Terms, seed: int) -> tuple[Scores, Run]:
    """A finished run. Raises ModelError where its files are damaged."""
    try:
        scores = read_scores(place / "predictions.csv")
        return scores, _finished(place, term, seed, scores)
    except (ModelError, OSError, LookupError, ValueError, TypeError) as error:
        raise ModelError(
            f"The run {printable(str(place))} is damaged ({printable(str(error))}); remove its folder and give the "
            "command again, and it trains anew."
        ) from None


def read_scores(path: Path) -> Scores:
    """The predictions of a run. Raises OSError, LookupError or ValueError where they are damaged."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    if not rows:
        raise ValueError(f"{path.name} has no rows")
    return Scores(
        tuple(row["path"] for row in rows),
        tuple(row["label"] for row in rows),
        tuple(row["predicted"] for row in rows),
        np.array([float(row["label_probability"]) for row in rows]),
    )


def _finished(place: Path, term: Terms, seed: int, scores: Scores) -> Run:
    epochs = stored_settings(place).epochs
    lines = read_metrics(place / METRICS)
    validations = [line for line in lines if line["kind"] == "validation"]
    seconds = sum(_seconds(line) for line in lines if line["kind"] == "train")
    last = max((line["step"] for line in lines), default=0)
    validating = sum(_seconds(line) for line in validations if line["step"] < last)
    training, crops = seconds - validating, term.crops(epochs)
    return Run(
        entry=term.entry.name,
        seed=seed,
        folder=f"runs/{place.name}",
        state="finished",
        top1=float(scores.correct.mean()),
        balanced=float((scores.correct * scores.weights).mean()),
        log_loss=float(-scores.log_likelihood.mean()),
        seconds=seconds,
        crops_per_second=crops / training if training > 0 else None,
        memory=_memory(place.with_name(f"{place.name}.json")),
        epochs=epochs,
        curve=tuple(
            (float(term.crops(epochs, line["step"])), float(line["value"])) for line in validations
        ),
    )


def _seconds(line: dict[str, Any]) -> float:
    return float(line["clock"]["seconds"])


def _memory(path: Path) -> int | None:
    """What `nearkin.comparison.run` wrote at the end; None where it could not."""
    try:
        return int(json.loads(path.read_text())["memory"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _check_same_images(scores: dict[tuple[str, int], Scores]) -> None:
    """Raises ModelError for a run that was tested on other images than most."""
    tested = Counter((found.paths, found.labels) for found in scores.values())
    for (name, seed), found in scores.items():
        if (found.paths, found.labels) != tested.most_common(1)[0][0]:
            raise ModelError(
                f"The run {printable(name)} of seed {seed} was tested on other images than most; remove its folder and "
                "give the command again, or another --out."
            )


def _common_seeds(scores: dict[tuple[str, int], Scores]) -> set[int]:
    """Those that every entry with a finished run has finished."""
    seeds: dict[str, set[int]] = {}
    for name, seed in scores:
        seeds.setdefault(name, set()).add(seed)
    return set.intersection(*seeds.values()) if seeds else set()


def _classes(scores: dict[tuple[str, int], Scores]) -> dict[str, dict[str, float]]:
    """Accuracy of each class, as a mean over the seeds of each entry."""
    found: dict[str, dict[str, list[float]]] = {}
    for (name, _), each in scores.items():
        labels, correct = np.array(each.labels), each.correct
        for label in sorted(set(each.labels)):
            hits = float(correct[labels == label].mean())
            found.setdefault(name, {}).setdefault(label, []).append(hits)
    return {
        name: {label: statistics.mean(values) for label, values in classes.items()}
        for name, classes in found.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
