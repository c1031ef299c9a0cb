"""Start, continue or only resolve a run, from flat options.

torch and all that imports it are loaded late: what is wrong with options, DATA or a run folder is said at once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from nearkin.catalogue import check_objective
from nearkin.config import CONFIG_FILE, FREE_ON_RESUME, RunConfig, merge, validate
from nearkin.errors import ConfigError, DivergedError, ModelError, is_out_of_memory, printable
from nearkin.evaluation.own_data import described, explaining_place
from nearkin.process import exit_if_importing_main, launched, refuse_other_launchers, restarts
from nearkin.settings import Settings
from nearkin.training import run_folder
from nearkin.training.console import say
from nearkin.training.loggers import check_installed
from nearkin.types import Result

if TYPE_CHECKING:
    from nearkin.data.decode import BadImage
    from nearkin.data.sources.listing import Listing
    from nearkin.distributed import Runtime
    from nearkin.training.options import TrainOptions
    from nearkin.training.prepare import Prepared


def train(
    data: str | Path | None = None,
    objective: str | None = None,
    *,
    objective_options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    quiet: bool = True,
    report: bool = True,
    **options: Unpack[TrainOptions],
) -> Result:
    """Train an image classifier; returns its run folder and test accuracy.

    data: a built-in name, a folder of class folders, or a CSV/parquet table; default `digits`. objective: default
    `cone`, from pretrained weights `supcon`. options: as on the command line, with underscores for hyphens. quiet:
    nothing on stderr. report: write report.html, a page to look at, into the run folder.
    resume: a run folder to continue with its own settings; then `data` is where the same images are now.
    Raises the errors of `nearkin.errors`, whose `code` is the exit code of the command line.
    """
    own = {f"objective.{name}": value for name, value in (objective_options or {}).items()}
    named = {"data": None if data is None else str(data), "objective": objective}
    values = {name: value for name, value in named.items() if value is not None} | own | options
    if resume is not None:
        return continue_run(Path(resume), values, quiet=quiet, report=report)
    return start_run(values, quiet=quiet, report=report)


def start_run(values: Mapping[str, Any], *, quiet: bool, report: bool = True) -> Result:
    """A new run from flat options, or one that an earlier start by the same torchrun began. Raises ConfigError,
    DataError, ModelError, DivergedError or Stopped."""
    started = time.monotonic()
    exit_if_importing_main()
    begun = _begun(values.get("out"))
    if begun is not None:
        say(f"torchrun has started this run again: {begun} goes on", quiet or launched().rank > 0)
        return continue_run(begun, values, quiet=quiet, report=report)
    config, listing = checked_options(values)
    run_folder.check_free(config.out)
    with running(config) as runtime:
        from nearkin.data.look import BadImages
        from nearkin.training.prepare import prepare
        from nearkin.training.trainer import Trainer

        try:
            prepared = prepare(config, runtime, listing=listing, quiet=quiet, started=started)
        except BadImages as error:
            folder = _folder_with_list(config, error.bad) if runtime.is_main else None
            # Every rank learns the path, since any of them may report the error first.
            path = Path(str(runtime.share(folder))) / run_folder.BAD_FILES
            raise type(error)(f"{error} All are listed in {path}.", error.bad) from None
        folder = _create_folder(prepared, config, listing, runtime)
        runtime = runtime.at(prepared.settings.precision)
        return Trainer(prepared, runtime, folder, quiet=quiet, report=report).run()


def _begun(out: Any) -> Path | None:
    """The run folder `out` of an earlier start of the same torchrun; None at the first start, and where that one did
    not get so far. Raises ConfigError where each start would begin a run of its own."""
    count, most = restarts()
    if most and out is None:
        raise ConfigError(
            f"torchrun may start this run again (--max-restarts {most}), and without --out each start would begin a "
            "new one; give --out."
        )
    again = count and (Path(str(out)) / CONFIG_FILE).is_file()
    return Path(str(out)) if again else None


def continue_run(
    run: Path, values: Mapping[str, Any], *, quiet: bool, report: bool = True
) -> Result:
    """Continue at the newest checkpoint of `run`.

    values: the options of the run once more, or new values of those in FREE_ON_RESUME; `data` is where the same images
    are now. Raises ModelError for other changes and other images.
    """
    exit_if_importing_main()
    refuse_other_launchers()
    finished = run_folder.stored_state(run) == "finished"
    if finished and not values:  # settings may be missing: an imported model was not trained here
        return _finished(run, quiet)
    stored = run_folder.stored_settings(run)
    data = str(values.get("data", stored.data))
    listing = None if finished else _list_moved(data, stored.data)
    settings = _with_changes(stored, run, values)
    if finished:
        return _finished(run, quiet)

    with running(settings) as runtime:
        from nearkin.training.prepare import prepare
        from nearkin.training.trainer import Trainer

        prepared = prepare(
            settings,
            runtime,
            listing=listing,
            classes=run_folder.stored_classes(run),
            begun=runtime.share(run_folder.has_checkpoint(run)),
            quiet=quiet,
        )
        run_folder.check_identity(run, prepared.identity, settings.data)
        if runtime.is_main and settings.data != stored.data:
            with run_folder.locked(run):
                run_folder.write_settings(run, stored.model_copy(update={"data": settings.data}))
        return Trainer(prepared, runtime, run, quiet=quiet, report=report).run()


def _finished(run: Path, quiet: bool) -> Result:
    from nearkin.evaluation.model import read_description

    say(f"The run {run} is finished; there is nothing left to do.", quiet)
    return Result.of(run, read_description(run).metrics)


def resolved(values: Mapping[str, Any]) -> Settings:
    """The settings that `start_run` would use."""
    config, listing = checked_options(values)
    with running(config) as runtime:
        from nearkin.training.prepare import prepare

        return prepare(config, runtime, listing=listing, look=False).settings


def checked_options(values: Mapping[str, Any]) -> tuple[RunConfig, Listing | None]:
    """The options and what DATA holds, after every check that needs no torch: values, run folder, objective, DATA."""
    refuse_other_launchers()
    config: RunConfig = validate(RunConfig, values)
    check_installed(config.log)
    if config.out is not None:
        run_folder.check_free(config.out)
    if config.objective == "auto" and config.options:
        given = next(iter(config.options)).replace("_", "-")
        raise ConfigError(
            f"--objective.{given} belongs to an objective, which depends on the data; name it, such as "
            f"--objective cone --objective.{given} ..."
        )
    if config.objective != "auto":
        check_objective(config.objective, config.options)
    if config.from_scratch and (config.pretrained or config.weights is not None):
        other = "--pretrained" if config.pretrained else "--weights"
        raise ConfigError(f"--from-scratch and {other} exclude each other; give one of them.")
    return config, _list_data(config.data)


def _list_data(data: str) -> Listing | None:
    """The listing of DATA, or None for a built-in data set, which may have to be downloaded by one process."""
    from nearkin.data.sources.builtin import BUILTIN
    from nearkin.data.sources.resolve import resolve

    return None if data in BUILTIN else resolve(data)


def _list_moved(data: str, stored: str) -> Listing | None:
    """List the data of a run that is continued; `stored` is where they were when it started. Raises DataError."""
    advice = "continue it from there, or give the place of the images with --data"
    with explaining_place(data, advice) if data == stored else nullcontext():
        return _list_data(data)


def _with_changes(stored: Settings, run: Path, values: Mapping[str, Any]) -> Settings:
    """The stored settings with what a continued run may change. Raises ModelError for another change."""
    from nearkin.training.prepare import validated_options

    values = {k: v for k, v in values.items() if (k, v) != ("objective", "auto")}
    given: RunConfig = validate(RunConfig, merge(stored.flat(), values))
    check_installed(given.log)
    check_objective(given.objective, given.options)
    options = validated_options(given).model_dump(mode="json")
    new = given.model_copy(update={"options": options}).flat()
    old, first = stored.flat(), run_folder.stored_options(run).flat()
    free = FREE_ON_RESUME | {"data"}
    asked = [n for n in new if n not in free and new[n] not in (old.get(n), first.get(n))]
    if asked or given.objective != stored.objective:
        shown = ", ".join(f"{n} ({old.get(n)} -> {new[n]})" for n in sorted(asked))
        raise ModelError(
            f"A continued run cannot change {printable(shown)}; leave that out, or start a new run."
        )
    return stored.model_copy(update={name: getattr(given, name) for name in free})


@contextmanager
def running(config: RunConfig) -> Iterator[Runtime]:
    """The processes of the run. A RuntimeError of torch becomes one sentence that says what to do."""
    from nearkin.device import choose_device, choose_precision
    from nearkin.distributed import Runtime

    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    with Runtime(device=device, precision=precision) as runtime:
        try:
            yield runtime
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise DivergedError(
                    "The memory ran out; lower --batch-size, --image-size or --workers, or split the batch "
                    "with --accumulate."
                ) from error
            if "c++ compiler" in str(error).lower():
                raise ConfigError(
                    "--compile needs a C++ compiler, and none works here; install g++, or leave it out."
                ) from error
            raise


def _create_folder(
    prepared: Prepared, config: RunConfig, listing: Listing | None, runtime: Runtime
) -> Path:
    """Created by the first process; all others learn its name."""
    from nearkin.data.sources.resolve import resolve

    made: Path | None = None
    if runtime.is_main:
        dataset = prepared.dataset
        made = run_folder.create(config.out, data=config.data, objective=config.objective)
        try:
            run_folder.describe(made, prepared.settings, dataset.classes)
            identity = prepared.identity | described(listing or resolve(config.data))
            run_folder.write_origin(made, config, identity)
            _write_list(
                made, dataset.bad
            )  # last: a folder with nothing else may be taken by another run
        except BaseException:  # without these files nothing can go on there
            shutil.rmtree(made, ignore_errors=True)
            raise
    return cast("Path", runtime.share(made))


def _folder_with_list(config: RunConfig, bad: Sequence[BadImage]) -> Path:
    """A new run folder, which holds nothing but the list of bad images."""
    folder = run_folder.create(config.out, data=config.data, objective=config.objective)
    _write_list(folder, bad)
    return folder


def _write_list(folder: Path, bad: Sequence[BadImage]) -> None:
    from nearkin.data.look import write_bad_files

    path = folder / run_folder.BAD_FILES
    path.unlink(missing_ok=True)  # of an earlier try
    if bad:
        write_bad_files(path, bad)


__all__ = ["Result", "continue_run", "resolved", "start_run", "train"]
