"""`--tune`: the same number of trials for each entry, judged on validation, before the comparison itself."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from nearkin.comparison import launch
from nearkin.comparison.plan import Job, Terms, jobs
from nearkin.config import to_yaml
from nearkin.errors import ConfigError, ModelError, Stopped, printable
from nearkin.files import write_atomic
from nearkin.process import stop_handler
from nearkin.report.words import candidates
from nearkin.training.console import say
from nearkin.training.metrics_log import METRICS, read_metrics

if TYPE_CHECKING:
    from optuna import Study, Trial

    from nearkin.comparison.api import Planned, Request

FOLDER = "tune"
JOURNAL = "trials.journal"
OTHER_SEED = 1_000_000  # trials train with a seed that the comparison does not use
LOOK = 1.0  # seconds between two looks at a trial
RATES = 10.0  # the learning rate is tried between a tenth of its default and ten times that


class Range(NamedTuple):
    """low, high: where an option is searched. log: on a logarithmic scale."""

    low: float
    high: float
    log: bool = True


# Of the objectives' own options, those that an objective has. The learning rate is always searched.
RANGES: dict[str, Range] = {
    "weight": Range(0.1, 2.0),
    "temperature": Range(0.05, 0.5),
    "mix": Range(0.1, 0.9, log=False),
    "hardness": Range(0.0, 2.0, log=False),
    "neighbour_weight": Range(0.1, 2.0),
    "consistency_weight": Range(0.1, 3.0),
    "smoothing": Range(0.0, 0.2, log=False),
    "margin": Range(0.05, 0.5),
    "scale": Range(8.0, 64.0),
    "neighbour_temperature": Range(0.05, 0.5),
    "consistency_temperature": Range(0.03, 0.3),
    "alpha": Range(0.05, 2.0),
    "beta": Range(0.01, 2.0),
    "gamma": Range(0.1, 2.0),
    "repulse": Range(0.1, 2.0),
    "consistency": Range(0.1, 5.0),
}


def tuned(
    folder: Path, planned: Planned, request: Request, *, quiet: bool
) -> tuple[tuple[Terms, ...], list[str]]:
    """The terms with the best options of `--tune` trials each, and what these are in words.

    The defaults are the first trial, so that the result is never worse than them on validation. An option that an entry
    names itself is not searched.

    folder: of the comparison; an interrupted search goes on there. Raises Stopped on a signal, ConfigError when every
    trial of an entry fails.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    # Its warnings are tracebacks of what is raised here.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(place / JOURNAL)))
    equal = request.options.budget == "minutes"  # with the cores that a run will have
    machine = planned.machine(request.options.jobs, launch.MANY if equal else request.options.tune)
    stop = threading.Event()
    found, told = [], list[str]()
    with stop_handler(lambda _, __: stop.set()):
        for term in planned.terms:
            study = optuna.create_study(
                study_name=term.entry.folder,
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
            )
            # Of a search that goes on: with the same numbers it would repeat its trials.
            study.sampler = optuna.samplers.TPESampler(seed=request.seed + len(study.trials))
            search = _Search(place, term, planned.values, request, machine, stop)
            if not search.ranges:
                told.append(f"{term.entry.name}: its options leave nothing to search")
                say(told[-1], quiet)
                found.append(term)
                continue
            search.run(study)
            told.append(f"{term.entry.name}: {search.outcome(study)}")
            say(told[-1], quiet)
            best = search.options(study.best_params)
            found.append(term._replace(options=term.options | best))
    return tuple(found), told


class _Search:
    """The trials of one entry."""

    def __init__(
        self,
        folder: Path,
        term: Terms,
        values: Mapping[str, Any],
        request: Request,
        machine: launch.Machine,
        stop: threading.Event,
    ) -> None:
        self.folder, self.term, self.values = folder, term, values
        self.request, self.machine, self.stop = request, machine, stop
        self.errors: list[Exception] = []
        self.places: SimpleQueue[int] = SimpleQueue()
        for place in range(machine.number):
            self.places.put(place)
        own = term.settings.options
        given = term.entry.options
        self.ranges = {
            f"objective.{name}": each
            for name, each in RANGES.items()
            if name in own and f"objective.{name}" not in given
        }
        if "lr" not in given:
            lr = term.settings.lr
            self.ranges["lr"] = Range(lr / RATES, lr * RATES)

    def options(self, params: Mapping[str, float]) -> dict[str, Any]:
        """The options of a trial as they are given to a run."""
        return {name: float(f"{value:.4g}") for name, value in params.items()}

    def run(self, study: Study) -> None:
        """Take what is missing of the trials; those that were interrupted are taken again."""
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:  # its process was killed
                study.tell(trial.number, state=TrialState.FAIL)
        taken = [
            trial.system_attrs.get("fixed_params", trial.params)
            for trial in study.get_trials(deepcopy=False)
            if trial.state != TrialState.FAIL
        ]
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))  # stopped or killed
        for params in (self._defaults(), *(trial.params for trial in failed)):
            if params and params not in taken:
                study.enqueue_trial(params)
                taken.append(params)
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        done = len(study.get_trials(deepcopy=False, states=ended))
        missing = self.request.options.tune - done
        if missing > 0:
            try:
                study.optimize(self._caught, n_trials=missing, n_jobs=self.machine.number)
            except Exception as error:  # of several trials at a time Optuna raises some
                self.errors.append(error)
        if self.stop.is_set():
            raise Stopped(launch.STOPPED)
        if self.errors:
            raise self.errors[0]
        if study.best_value < 0:
            raise ConfigError(
                f"Every trial of {printable(self.term.entry.name)} failed; its errors are in "
                f"{printable(str(self.folder))}. Remove that folder, and the same command searches again."
            )

    def outcome(self, study: Study) -> str:
        """The best trial in words, and how many failed."""
        shown = ", ".join(f"{name} {value:.3g}" for name, value in study.best_params.items())
        failed = sum((trial.value or 0) < 0 for trial in study.trials)
        without = f", {failed} of which failed (errors in {self.folder})" if failed else ""
        best, tune = f"{100 * study.best_value:.2f} %", self.request.options.tune
        return f"{shown}, the best on validation ({best}) of {tune} trials{without}"

    def _defaults(self) -> dict[str, float]:
        settings = self.term.settings
        own = {f"objective.{name}": value for name, value in settings.options.items()}
        values = own | {"lr": settings.lr}
        return {
            name: min(max(float(values[name]), each.low), each.high)
            for name, each in self.ranges.items()
        }

    def _caught(self, trial: Trial) -> float:
        """As `_trial`; what it raises, but for a trial that is given up, is kept."""
        from optuna import TrialPruned

        try:
            return self._trial(trial)
        except TrialPruned:
            raise
        except Exception as error:
            self.errors.append(error)
            trial.study.stop()
            raise

    def _trial(self, trial: Trial) -> float:
        """The best validation value of a run with the options of this trial; -1 where it fails."""
        params = {
            name: trial.suggest_float(name, each.low, each.high, log=each.log)
            for name, each in self.ranges.items()
        }
        term = self.term._replace(options=self.term.options | self.options(params))
        job: Job = jobs([term], self.values, [self.request.seed + OTHER_SEED])[0]
        name = f"{self.term.entry.folder}-{trial.number}"
        write_atomic(self.folder / f"{name}.yaml", to_yaml(job.config, given=True).encode())
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)  # of a trial that was killed
        place = self.places.get()
        process = launch.start(self.folder, name, self.machine, place)
        pruned, seen = False, set[int]()
        while process.poll() is None:
            time.sleep(LOOK)
            if self.stop.is_set() or (not pruned and _hopeless(trial, run, seen)):
                pruned = not self.stop.is_set()
                launch.stop([process])
        self.places.put(place)
        if self.stop.is_set():
            raise Stopped(launch.STOPPED)
        values = candidates(
            _lines(run)
        )  # of the last stage, which gives the model, and of the probe
        shutil.rmtree(run, ignore_errors=True)  # a model of each trial would fill the disk
        if pruned:
            from optuna import TrialPruned

            raise TrialPruned
        return max(values, default=-1.0) if process.returncode == 0 else -1.0


def _hopeless(trial: Trial, run: Path, seen: set[int]) -> bool:
    """Report the validations since the last look; whether most other trials were better at this point.

    seen: steps that have been reported.
    """
    for step, value in _validations(run):
        if step not in seen:
            trial.report(value, step)
            seen.add(step)
    return bool(trial.should_prune())


def _validations(run: Path) -> list[tuple[int, float]]:
    """Step and value of each."""
    return [
        (line["step"], float(line["value"])) for line in _lines(run) if line["kind"] == "validation"
    ]


def _lines(run: Path) -> list[dict[str, Any]]:
    """Of the journal; none where the run has not begun."""
    try:
        return read_metrics(run / METRICS)
    except ModelError:
        return []
