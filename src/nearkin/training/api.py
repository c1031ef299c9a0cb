"""One run, from the options to a finished run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from nearkin.config import FREE_ON_RESUME, RunConfig, merge, validate
from nearkin.data.look import BadImages, write_bad_files
from nearkin.distributed import Runtime, choose_device, choose_precision
from nearkin.errors import ConfigError, DivergedError, NearkinError
from nearkin.evaluation.model import read_description
from nearkin.objectives import get
from nearkin.training import run_folder
from nearkin.training.metrics_log import STATUS
from nearkin.training.prepare import Prepared, Result, prepare, same_options, say, to_result
from nearkin.training.trainer import Trainer

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def train(
    data: str | Path = "digits",
    objective: str = "cone",
    *,
    objective_options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    quiet: bool = True,
    **options: Any,
) -> Result:
    """Train an image classifier; returns its run folder and test accuracy.

    data: a built-in name, a folder of class folders, or a CSV/parquet table. options: as on the command line, with
    underscores for hyphens. resume: a run folder to continue with its own options. quiet: nothing on stderr.
    Raises the errors of `nearkin.errors`, whose `code` is the exit code of the command line.
    """
    values = {f"objective.{name}": value for name, value in (objective_options or {}).items()}
    if resume is not None:
        return continue_run(Path(resume), values | options, quiet=quiet)
    return start_run({"data": str(data), "objective": objective} | values | options, quiet=quiet)


def start_run(values: Mapping[str, Any], *, quiet: bool) -> Result:
    """A fresh run from flat options."""
    config: RunConfig = validate(RunConfig, values)
    validate(get(config.objective).Config, config.options, prefix="objective.")

    def work(runtime: Runtime) -> Result:
        try:
            job = prepare(config, runtime, quiet=quiet)
        except BadImages as error:
            raise _listed(error, config, runtime) from None
        folder = _create_folder(job, runtime)
        return Trainer(job, runtime.at(job.precision), folder, quiet=quiet).run()

    return _with_runtime(config, work)


def continue_run(run: Path, values: Mapping[str, Any], *, quiet: bool) -> Result:
    """Go on where the newest checkpoint of `run` stands. `values` may change workers, log level and intervals."""
    stored = run_folder.stored_config(run)
    given: RunConfig = validate(RunConfig, merge(stored.flat(), values))
    options = validate(get(given.objective).Config, given.options, prefix="objective.")
    given = given.model_copy(update={"options": options.model_dump(mode="json")})
    same_options(stored, given)
    free = {name: getattr(given, name) for name in FREE_ON_RESUME}
    config = stored.model_copy(update=free)
    finished = _finished(run)
    if finished is not None:
        say(f"The run {run} is finished; there is nothing left to do.", quiet)
        return finished

    def work(runtime: Runtime) -> Result:
        classes = run_folder.stored_classes(run)
        job = prepare(config, runtime, classes=classes, quiet=quiet)
        return Trainer(job, runtime, run, quiet=quiet).run()

    return _with_runtime(config, work)


def resolved(values: Mapping[str, Any]) -> RunConfig:
    """The options with every `auto` replaced, as `start_run` would store them."""
    config: RunConfig = validate(RunConfig, values)

    def work(runtime: Runtime) -> RunConfig:
        return prepare(config, runtime).config

    return _with_runtime(config, work)


def _with_runtime(config: RunConfig, work: Callable[[Runtime], T]) -> T:
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    with Runtime(device=device, precision=precision) as runtime, _named_failures():
        return work(runtime)


@contextmanager
def _named_failures() -> Iterator[None]:
    """What torch reports with a plain RuntimeError becomes one sentence that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
            raise DivergedError(
                "The memory ran out; lower --batch-size, --image-size or --workers, or split the batch "
                "with --accumulate."
            ) from error
        if "c++ compiler" in text:
            raise ConfigError(
                "--compile needs a C++ compiler, and none works here; install g++, or leave it out."
            ) from error
        raise


def _create_folder(job: Prepared, runtime: Runtime) -> Path:
    """On the first process; all others learn its name."""
    made: Path | None = None
    if runtime.is_main:
        config = job.config
        made = run_folder.create(config.out, data=config.data, objective=config.objective)
        run_folder.describe(made, config, job.dataset.classes, run_folder.command_line())
        bad_files = made / run_folder.BAD_FILES
        bad_files.unlink(missing_ok=True)  # of an earlier try
        if job.dataset.bad:
            write_bad_files(bad_files, job.dataset.bad)
    return cast("Path", runtime.share(made))


def _listed(error: BadImages, config: RunConfig, runtime: Runtime) -> NearkinError:
    """The error, after all bad images have been listed in a run folder that holds nothing else."""
    if not runtime.is_main:
        return error
    folder = run_folder.create(config.out, data=config.data, objective=config.objective)
    path = folder / run_folder.BAD_FILES
    write_bad_files(path, error.bad)
    return type(error)(f"{error} All are listed in {path}.", error.bad)


def _finished(run: Path) -> Result | None:
    try:
        state = json.loads((run / STATUS).read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if state != "finished":
        return None
    return to_result(run, read_description(run).metrics)


__all__ = ["Result", "continue_run", "resolved", "start_run", "train"]
