"""`nearkin.compare`: from options to finished runs, their statistics and the files that show them."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import yaml

from nearkin.comparison.entries import REFUSED, Entry, parse
from nearkin.config import (
    CONFIG_FILE,
    Auto,
    CompareOptions,
    RunConfig,
    read_yaml,
    to_yaml,
    validate,
)
from nearkin.data.sources.builtin import BUILTIN
from nearkin.errors import ConfigError, Stopped, counted, printable, to_install
from nearkin.files import write_atomic
from nearkin.process import exit_if_importing_main, launched
from nearkin.training import run_folder
from nearkin.training.api import checked_options, running
from nearkin.training.console import duration, say

if TYPE_CHECKING:
    from nearkin.comparison.launch import Machine
    from nearkin.comparison.plan import Job, Terms
    from nearkin.comparison.results import Comparison
    from nearkin.data.sources.listing import Listing
    from nearkin.training.options import TrainOptions

REQUEST = "compare.yaml"
RUNS = "runs"
SPLIT = "split.csv"
# What a later call may change; whether the images at another path are the same is checked with the runs.
FREE = ("jobs", "submit", "seeds", "objectives", "pick", "data")


class Request(NamedTuple):
    """A comparison as it was asked for. values: flat options of every run, without objective, seed and out."""

    options: CompareOptions
    entries: tuple[Entry, ...]
    values: dict[str, Any]
    seed: int

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.options.seeds)


def compare(
    data: str | Path | None = None,
    objectives: str | Sequence[str] = "ce,supcon,cone",
    *,
    seeds: int = 5,
    budget: Literal["crops", "minutes"] = "crops",
    tune: int = 0,
    jobs: int | Auto = "auto",
    submit: Literal["no", "slurm", "ray"] = "no",
    pick: bool = False,
    quiet: bool = True,
    **options: Unpack[TrainOptions],
) -> Comparison:
    """Train several objectives on equal terms, and say whether their differences are more than chance.

    objectives: names, each with its options (`supcon:weight=1:lr=1e-3`), or `ce+ls` and `ce+ema`; `ce` is added. Other
    arguments: as on the command line (`nearkin compare --help`). options: of every run; `out` is the folder of the
    comparison, and a folder of an earlier call goes on: finished runs stay, seeds and objectives may be added.

    Raises the errors of `nearkin.errors`. A run that fails is part of the result and raises nothing.
    """
    names = objectives if isinstance(objectives, str) else ",".join(objectives)
    asked = {"objectives": names, "seeds": seeds, "budget": budget}
    asked |= {"tune": tune, "jobs": jobs, "submit": submit, "pick": pick}
    values = dict(options) | ({} if data is None else {"data": str(data)})
    return compare_options(asked, values, quiet=quiet)


def compare_options(
    asked: Mapping[str, Any], values: Mapping[str, Any], *, quiet: bool
) -> Comparison:
    """As `compare`, from the flat options of `CompareOptions` and of `RunConfig`."""
    exit_if_importing_main()
    if launched().world_size > 1:
        raise ConfigError(
            "compare starts processes of its own; run it without torchrun or srun, or with --submit slurm."
        )
    request, out = _request(asked, values)
    config, listing = checked_options(request.values | {"objective": "ce"})
    folder, known = _folder(out, config.data, request)
    with run_folder.locked(folder):
        try:
            planned = _plan(folder, config, listing, request, quiet)
        except Exception:
            if not known:  # nothing has run in it
                shutil.rmtree(folder, ignore_errors=True)
            raise
        request = _with_jobs(folder, planned, request)
        try:
            return _compare(folder, config, planned, request, quiet)
        except Stopped as error:
            raise Stopped(f"{error} It is in {folder}: --out {folder}") from None


def _compare(
    folder: Path, config: RunConfig, planned: Planned, request: Request, quiet: bool
) -> Comparison:
    """Tune, run what is missing, judge, pick and write."""
    if request.options.tune:
        from nearkin.comparison.tuning import tuned

        found_terms, told = tuned(folder, planned, request, quiet=quiet)
        planned = planned._replace(terms=found_terms, notes=(*planned.notes, *told))
    from nearkin.comparison.plan import equal, jobs
    from nearkin.comparison.results import collect
    from nearkin.comparison.tables import write

    every = jobs(planned.terms, planned.values, request.seeds)
    others = _others(folder / RUNS, [job.name for job in every])
    if others:
        note = (
            f"{counted(others, 'run')} of other seeds or entries in {folder / RUNS} are not shown"
        )
        planned = planned._replace(notes=(*planned.notes, note))
        say(f"note: {note}", quiet)
    _write_jobs(folder / RUNS, every, planned, request)
    _run_all(folder, every, request.options, planned, quiet)
    found = collect(
        folder,
        planned.terms,
        every,
        data=config.data,
        equal=equal(planned.terms, request.options.budget, request.values.get("minutes")),
        notes=planned.notes,
    )
    write(found)  # before the winner trains, which may fail
    if request.options.pick and any(run.state == "waiting" for run in found.runs):
        say("note: nothing is picked before all runs have ended", quiet)
    elif request.options.pick:
        from nearkin.comparison.pick import pick

        found = pick(found, planned, request, quiet=quiet)
        write(found)
    return found


class Planned(NamedTuple):
    """values: flat options of every run, with the data that are used. device: its type. gpus: those to use. notes: for
    a person."""

    terms: tuple[Terms, ...]
    values: dict[str, Any]
    device: str
    gpus: tuple[str, ...]
    notes: tuple[str, ...]

    def machine(self, jobs: int | Auto, runs: int) -> Machine:
        """How so many runs share this machine."""
        from nearkin.comparison.launch import Machine

        return Machine.of(jobs, runs, self.device, self.gpus)


def _plan(
    folder: Path, config: RunConfig, listing: Listing | None, request: Request, quiet: bool
) -> Planned:
    """The terms of all entries, on data with a test split."""
    import torch

    from nearkin.comparison.launch import visible_gpus
    from nearkin.comparison.plan import terms, unequal
    from nearkin.comparison.splits import other_images, rows_with_test, write_table
    from nearkin.comparison.tuning import OTHER_SEED

    (folder / RUNS).mkdir(exist_ok=True)
    table, values, notes = folder / SPLIT, request.values, tuple[str, ...]()
    rows = None if listing is None else rows_with_test(listing)
    if rows is not None:
        begun = any((folder / RUNS).glob(f"*/{CONFIG_FILE}"))
        if begun and other_images(table, rows):  # what the runs test on may not change
            raise _images_changed(config.data, folder)
        write_table(table, rows)
        values = values | {"data": str(table)}
        note = (
            f"{config.data} has no test split: a fifth of its training images is held out ({SPLIT})"
        )
        notes = (note,)
        say(f"note: {note}", quiet)
    with running(config) as runtime:
        found, told = terms(
            request.entries,
            values,
            budget=request.options.budget,
            seeds=[*request.seeds, *([request.seed + OTHER_SEED] if request.options.tune else [])],
            runtime=runtime,
            quiet=quiet,
        )
        notes += told
        if request.options.budget == "crops":
            for note in unequal(found):
                notes = (*notes, note)
                say(f"note: {note}", quiet)
        device = runtime.device.type
        gpus = visible_gpus() if device == "cuda" else ()
        if gpus:
            torch.cuda.empty_cache()  # of this process, which waits while the runs train
        return Planned(found, values, device, gpus, notes)


def _with_jobs(folder: Path, planned: Planned, request: Request) -> Request:
    """The request with the number for `--jobs auto`, where it is part of the terms: the memory that is free later would
    give another one."""
    from nearkin.comparison.launch import MANY

    options = request.options
    if options.budget != "minutes" or options.jobs != "auto" or options.submit != "no":
        return request
    number = read_yaml(folder / REQUEST)["jobs"]
    if number == "auto":
        number = planned.machine("auto", MANY).number
    request = request._replace(options=options.model_copy(update={"jobs": number}))
    _write_request(folder, request)
    return request


def _images_changed(data: str, folder: Path) -> ConfigError:
    return ConfigError(
        f"The images in {printable(data)} are not those of the runs in {printable(str(folder))} (names, sizes, "
        "classes or folders differ); put them back, or give another --out."
    )


def _request(asked: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[Request, Path | None]:
    options: CompareOptions = validate(CompareOptions, asked)
    for name in values:
        if name in REFUSED or name.startswith("objective."):
            ours = name.startswith("objective")
            advice = (
                "give --objectives, with options as in supcon:weight=1" if ours else "leave it out"
            )
            raise ConfigError(f"--{name.replace('_', '-')} is not for compare; {advice}.")
    own = {name: value for name, value in values.items() if name not in ("out", "seed")}
    config: RunConfig = validate(RunConfig, values)
    if options.budget == "minutes" and config.minutes in ("auto", 0):
        raise ConfigError("--budget minutes needs --minutes, the time of each run.")
    if options.budget == "minutes" and config.epochs != "auto":
        raise ConfigError("--budget minutes trains as many epochs as fit; leave --epochs out.")
    if (options.pick or options.tune) and config.val_split == 0:
        _check_validation(config.data)
    if options.budget == "crops" and config.minutes not in ("auto", 0):
        raise ConfigError("--minutes needs --budget minutes; with equal crops use --epochs.")
    if options.budget == "crops":
        own["minutes"] = 0.0
    own.setdefault("split_seed", config.seed)  # the same validation images for all seeds
    if options.tune and find_spec("optuna") is None:
        raise ConfigError(f"--tune needs Optuna; {to_install('tune')}.")
    if options.submit == "ray" and find_spec("ray") is None:
        raise ConfigError(f"--submit ray needs Ray; {to_install('ray')}.")
    if options.pick and config.images_per_class is not None and config.data in BUILTIN:
        raise ConfigError(
            "--pick trains on the images that --images-per-class chose and those of validation, which needs image "
            "files, not built-in data; leave one of the two out."
        )
    entries = parse(options.objectives.split(","))
    return Request(options, entries, own, config.seed), config.out


def _check_validation(data: str) -> None:
    """Raises ConfigError where there is no validation split to pick by."""
    from nearkin.data.sources.resolve import resolve

    if data in BUILTIN or "val" not in resolve(data).parts:
        raise ConfigError("--pick and --tune choose on validation images; leave out --val-split 0.")


def _folder(out: Path | None, data: str, request: Request) -> tuple[Path, bool]:
    """The folder of the comparison, and whether it is one that goes on. Raises ConfigError."""
    if out is None or not out.exists():
        folder = run_folder.create(out, data=data, objective="compare")
        _write_request(folder, request)
        return folder, False
    shown = printable(str(out))
    if not (out / REQUEST).is_file():
        raise ConfigError(f"{shown} exists and holds no comparison; give another --out.")
    usual = CompareOptions().model_dump()  # of options that came later
    stored, now = usual | _plain(read_yaml(out / REQUEST)), _plain(_described(request))
    if request.options.budget == "minutes" and now["jobs"] == "auto":
        now["jobs"] = stored["jobs"]
    changed = [name for name in stored | now if stored.get(name) != now.get(name)]
    # How many runs share the machine is part of what they get in equal minutes.
    free = set(FREE) - ({"jobs"} if request.options.budget == "minutes" else set())
    changed = [name for name in changed if name not in free]
    if changed:
        words = ", ".join(f"{n} ({stored.get(n)} -> {now.get(n)})" for n in sorted(changed))
        raise ConfigError(
            f"{shown} holds a comparison with other options: {printable(words)}; give them as they were, or another "
            "--out."
        )
    return out, True


def _described(request: Request) -> dict[str, Any]:
    """The request as plain values."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in request.values.items()}
    values = values | request.options.model_dump() | {"seed": request.seed}
    read: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    return read


def _plain(described: dict[str, Any]) -> dict[str, Any]:
    """The same with the values that options have once they are read: `8` of the command line is 8 of Python."""
    own = {k: v for k, v in described.items() if k in CompareOptions.model_fields}
    rest = {k: v for k, v in described.items() if k not in own}
    read: dict[str, Any] = yaml.safe_load(to_yaml(validate(RunConfig, rest), given=True))
    return read | own


def _write_request(folder: Path, request: Request) -> None:
    text = yaml.safe_dump(_described(request), sort_keys=False, allow_unicode=True)
    write_atomic(folder / REQUEST, text.encode())


def _write_jobs(folder: Path, jobs: Sequence[Job], planned: Planned, request: Request) -> None:
    """Write the options of each run. Raises ConfigError where a run that has begun had others, or other images."""
    where = printable(str(folder.parent))
    for job in jobs:
        path, run = folder / f"{job.name}.yaml", folder / job.name
        text = to_yaml(job.config, given=True)
        if run.exists() and path.exists():
            stored, now = (_plain_terms(each) for each in (path.read_text(encoding="utf-8"), text))
            if stored != now:
                raise ConfigError(
                    f"The terms of {printable(job.entry.name)} are no longer those of the runs in {where}; give "
                    "another --out."
                )
            alike = job.seed == request.seed or job.config.images_per_class is None
            if alike and run_folder.stored_images(run) not in (None, planned.terms[0].images):
                raise _images_changed(job.config.data, folder.parent)
        write_atomic(path, text.encode())


def _others(folder: Path, names: Sequence[str]) -> int:
    """Runs of an earlier call that this one does not ask for."""
    return len({path.parent.name for path in folder.glob("*/config.yaml")} - set(names))


def _plain_terms(text: str) -> Any:
    """Without the place of the images, and of what is decoded, which changes no pixel."""
    return yaml.safe_load(text) | {"data": None, "cache": None}


def _run_all(
    folder: Path, jobs: Sequence[Job], options: CompareOptions, planned: Planned, quiet: bool
) -> None:
    """Run what is not finished; on a SLURM cluster, only submit it."""
    from nearkin.comparison import launch

    runs = folder / RUNS
    names = [job.name for job in jobs if run_folder.stored_state(runs / job.name) != "finished"]
    if not names:
        return
    # For all runs, though some are finished: what is left has the threads that they had.
    # In equal minutes they are part of the terms, whatever is added later.
    equal = options.budget == "minutes"
    machine = planned.machine(options.jobs, launch.MANY if equal else len(jobs))
    said = f"{counted(len(names), 'run')} of {len(jobs)}"
    if options.submit == "slurm":
        limit = None if options.jobs == "auto" else options.jobs
        say(f"{said}: {launch.slurm(runs.absolute(), names, limit)}", quiet)
        say("give the same command again when they have ended", quiet)
        return
    at_once = "" if options.submit == "ray" else f", {min(machine.number, len(names))} at a time"
    say(f"{said}{at_once} -> {folder}", quiet)
    began, ended = time.monotonic(), list[str]()

    def end(name: str, code: int) -> None:
        ended.append(name)
        failure = runs / f"{name}.error"
        if code not in (0, Stopped.code) and not failure.exists():
            killed = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            write_atomic(failure, f"it ended with code {code}{killed}; see {name}.log\n".encode())
        each = (time.monotonic() - began) / len(ended)
        left = duration(each * (len(names) - len(ended)))
        say(f"[{len(ended)}/{len(names)}] {launch.outcome(runs, name, code)}  {left} left", quiet)

    if options.submit == "ray":
        launch.ray(runs.absolute(), names, end)
    else:
        launch.local(runs, names, machine, end)
