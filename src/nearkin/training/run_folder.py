"""The run folder: its name, its creation, and the files that describe the run. Imports torch only to write them."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nearkin.config import CONFIG_FILE, GIVEN_FILE, RunConfig, stored, to_yaml
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.evaluation.options import IDENTITY
from nearkin.files import write_atomic
from nearkin.settings import Settings
from nearkin.training.console import say

BAD_FILES = "bad_files.csv"
LOCK = ".lock"
STATUS = "status.json"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
PACKAGES = ("nearkin", "torch", "torchvision", "timm", "numpy", "pillow")


def create(out: Path | None, *, data: str, objective: str) -> Path:
    """A new folder. `out` must not exist (or hold only the list of bad images that an earlier try left there).

    Without `out`: runs/DATA-OBJECTIVE-DATE (without OBJECTIVE where it is `auto`), with -2, -3, ... when taken. Raises
    ConfigError.
    """
    try:
        if out is None:
            return _next_folder(data, objective)
        check_free(out)
        if not _only_bad_files(out):
            out.mkdir(parents=True)  # fails where another run has just made it
    except OSError as error:
        where = printable(str(out or "runs"))
        raise ConfigError(
            f"Cannot write the run folder {where}: {error.strerror}; choose another --out."
        ) from None
    return out


def check_free(out: Path | None) -> None:
    """Raises ConfigError when `out` exists and holds more than the list of bad images of an earlier try, or cannot be
    made."""
    place = Path("runs") if out is None else out
    try:
        there = next(path for path in (place, *place.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(
            f"Cannot write the run folder {printable(str(place))}: {error.strerror}; choose another --out."
        ) from None
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)) and not (out and there == out):
        raise ConfigError(
            f"Cannot write the run folder {printable(str(place))}: nothing can be made in {printable(str(there))}; "
            "choose another --out."
        )
    if out is not None and there == out and not _only_bad_files(out):
        raise ConfigError(
            f"The run folder {printable(str(out))} exists; choose another --out, or continue it "
            f"with --resume {printable(str(out))}."
        )


def _next_folder(data: str, objective: str) -> Path:
    place = Path(data)
    if place.name in ("", ".."):
        place = place.resolve()
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", place.stem).strip("-.") or "data"
    name = stem[:60] if objective == "auto" else f"{stem[:60]}-{objective}"
    first = Path("runs") / f"{name}-{datetime.now().astimezone():%Y%m%d}"
    folder, number = first, 1
    while not _only_bad_files(folder):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        else:
            break
    return folder


def _only_bad_files(folder: Path) -> bool:
    return folder.is_dir() and [p.name for p in folder.iterdir()] == [BAD_FILES]


class Busy(ConfigError):
    """Another process trains in the run folder."""


@contextmanager
def locked(folder: Path, *, quiet: bool = True) -> Iterator[None]:
    """Lets one process at a time train in a run folder. Raises Busy when another one does, ConfigError
    when nothing can be written there.

    The kernel releases the lock when its process ends in any way; loader workers do not inherit it. A file system
    without locks keeps nothing out of the folder, which is said unless `quiet`.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where nothing keeps two runs out of one folder
        yield
        return
    shown = printable(str(folder))
    try:
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"The run folder {shown} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise Busy(
                    f"Another process is training in {shown}; wait for it or stop it first."
                ) from None
            say(f"warning: {shown} has no locks ({error.strerror}); train there once only", quiet)
        yield


def describe(folder: Path, settings: RunConfig, classes: Sequence[str]) -> None:
    """Write config.yaml, classes.json and environment.json."""
    write_settings(folder, settings)
    write_json(folder / "classes.json", list(classes))
    write_json(folder / "environment.json", environment())


def write_settings(folder: Path, settings: RunConfig) -> None:
    """Write config.yaml, which `--config` reads too."""
    write_atomic(folder / CONFIG_FILE, to_yaml(settings).encode())


def write_origin(folder: Path, given: RunConfig, identity: dict[str, str]) -> None:
    """Write what a resumed run is compared with: given.yaml (options as given) and identity.json."""
    write_atomic(folder / GIVEN_FILE, to_yaml(given, given=True).encode())
    write_json(folder / IDENTITY, identity)


def write_json(path: Path, value: Any) -> None:
    """One JSON file, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _program() -> str:
    """How this process was called: `python -m nearkin` is `nearkin`, too."""
    name = Path(sys.argv[0]).name
    return "nearkin" if name == "__main__.py" else name


def environment() -> dict[str, Any]:
    """The command, versions and kind of machine, without names of hosts or people."""
    import torch

    return {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def stored_settings(run: Path) -> Settings:
    """The settings of a run. Raises ModelError when `run` is no run folder."""
    path = run / CONFIG_FILE
    if not path.is_file():
        what = "is no run folder (no config.yaml)" if run.is_dir() else "does not exist"
        what = "is a file" if run.is_file() else what
        raise ModelError(
            f"The run {printable(str(run))} {what}; give the folder that train printed."
        )
    return stored(Settings, path)


def stored_options(run: Path) -> RunConfig:
    """The options that a run was started with. Raises ModelError."""
    return stored(RunConfig, run / GIVEN_FILE)


def stored_state(run: Path) -> str | None:
    """`state` in status.json, or None where it cannot be read."""
    try:
        return str(_read_json(run / STATUS)["state"])
    except (ModelError, LookupError, TypeError):
        return None


def has_checkpoint(run: Path) -> bool:
    """Whether the run has saved anything to go on from."""
    return any((run / CHECKPOINTS).glob("step-*"))


def stored_classes(run: Path) -> tuple[str, ...]:
    """The class map of a run. Raises ModelError where it cannot be read."""
    path = run / "classes.json"
    found = _read_json(path)
    if not isinstance(found, list):
        raise ModelError(f"{printable(str(path))} is no list of classes.")
    return tuple(str(name) for name in found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{printable(str(path))} cannot be read.") from None


def stored_images(run: Path) -> str | None:
    """The fingerprint of the images that a run was started with; None where it is not known."""
    try:
        return str(_read_json(run / IDENTITY)["data"])
    except (ModelError, LookupError, TypeError):
        return None


def check_identity(run: Path, identity: dict[str, str], data: str) -> None:
    """Raises ModelError unless a run was started with these settings, classes and images."""
    stored = _read_json(run / IDENTITY)
    if not isinstance(stored, dict):
        raise ModelError(f"{printable(str(run / IDENTITY))} is no JSON object.")
    same = {name: stored.get(name) == identity[name] for name in identity}
    if all(same.values()):
        return
    if same["settings"] and not (same["data"] and same["classes"]):
        raise ModelError(
            f"The images in {printable(data)} are not those of the run {printable(str(run))} (names, sizes or classes "
            "differ); put them back, give their place with --data, or start a new run with "
            f"--weights {printable(str(run))}."
        )
    raise ModelError(
        f"The settings in {printable(str(run / CONFIG_FILE))} have changed since the run was started, or another "
        "version of nearkin has other ones; put the file or the version back, or start a new run."
    )
