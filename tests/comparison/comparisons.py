"""Comparisons made by hand, without training."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from nearkin.comparison.results import MEASURES, Comparison, Contrast, Run

HOSTILE = "<img src=x onerror=alert(1)>\"'&</title></style><script>\u202egnp\x1b[31m\udcff"
SHOWN = "&lt;img src=x onerror=alert(1)&gt;"  # how its beginning must look in the page


def run(entry: str, seed: int, *, top1: float = 0.9, epochs: int = 3) -> Run:
    """A finished run, whose curve ends at its accuracy."""
    return Run(
        entry=entry,
        seed=seed,
        folder=f"runs/{entry}-seed{seed}",
        state="finished",
        top1=top1,
        balanced=top1 - 0.01,
        log_loss=0.4,
        seconds=30.0 + seed,
        crops_per_second=2000.0,
        memory=512 * 2**20,
        curve=tuple((float(k), top1 * k / epochs) for k in range(1, epochs + 1)),
    )


def contrasts(
    entry: str, difference: float, verdict: str, *, half: float = 0.004, seeds: int = 5
) -> list[Contrast]:
    """The same in all measures."""
    return [
        Contrast(
            entry=entry,
            measure=measure,
            difference=difference,
            interval=(difference - half, difference + half),
            p_value=0.01,
            verdict=verdict,
            wins=seeds,
            seeds=seeds,
        )
        for measure in MEASURES
    ]


def comparison(
    runs: Sequence[Run],
    found: Sequence[Contrast] = (),
    *,
    classes: Collection[str] = ("cat", "dog"),
    data: str = "digits",
    notes: Sequence[str] = (),
) -> Comparison:
    """`runs` with the entry of the first as the baseline; every entry is better by 1 point in the next class."""
    entries = list(dict.fromkeys(run.entry for run in runs))
    done = [name for name in entries if any(r.entry == name and r.top1 for r in runs)]
    accuracy = {
        name: {c: 0.5 + 0.001 * ((3 * place + k) % 100) for k, c in enumerate(classes)}
        for place, name in enumerate(done)
    }
    return Comparison(
        folder=Path("/runs/compare"),
        data=data,
        baseline=entries[0],
        seeds=len({run.seed for run in runs}),
        images=360 if done else 0,
        equal={"batch size": "64", "budget": "57600 crops"},
        weights=dict.fromkeys(entries, 2_810_000),
        crops=dict.fromkeys(entries, 57_600),
        runs=tuple(runs),
        contrasts=tuple(found),
        classes=accuracy,
        notes=tuple(notes),
    )


def small() -> Comparison:
    """Four entries and five seeds; one run failed and one waits."""
    names = ("ce", "supcon", "cone", "ce+ema")
    runs = [
        run(n, s, top1=0.9 + 0.01 * k + 0.001 * s, epochs=6)
        for k, n in enumerate(names)
        for s in range(5)
    ]
    runs[13] = Run(
        entry="cone",
        seed=3,
        folder="runs/cone-seed3",
        state="failed",
        error="out of memory\nat step 3",
    )
    runs[19] = Run(entry="ce+ema", seed=4, folder="runs/ce-ema-seed4", state="waiting")
    found = [
        *contrasts("supcon", 0.021, "better", half=0.009),
        *contrasts("cone", -0.012, "worse"),
        *contrasts("ce+ema", 0.001, "undecided: about 12 more seeds would decide"),
    ]
    return comparison(runs, found, notes=["ce+ls is ce here, and is left out"])


def large() -> Comparison:
    """Ten entries, ten seeds, a hundred epochs and two hundred classes with long names."""
    names = ["ce", *(f"objective-number-{k}:weight=0.{k}" for k in range(1, 10))]
    runs = [
        run(n, s, top1=0.8 + 0.01 * k, epochs=100) for k, n in enumerate(names) for s in range(10)
    ]
    found = [
        c for k, n in enumerate(names[1:], 1) for c in contrasts(n, 0.01 * k, "better", seeds=10)
    ]
    return comparison(runs, found, classes=[f"species number {k} of the north" for k in range(200)])
