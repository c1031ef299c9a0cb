"""The run folder: its name, its birth, and what stands in it from the first minute."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nearkin.config import CONFIG_FILE, RunConfig, read_yaml, to_yaml, validate
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.files import write_atomic

BAD_FILES = "bad_files.csv"
LOCK = ".lock"
PACKAGES = ("nearkin", "torch", "torchvision", "timm", "numpy", "pillow")


def create(out: Path | None, *, data: str, objective: str) -> Path:
    """A new folder. `out` must not exist (or hold only the list of bad images that an earlier try left there).

    Without `out`: runs/DATA-OBJECTIVE-DATE, with -2, -3, ... when taken. Raises ConfigError.
    """
    try:
        return _create(out, data, objective)
    except OSError as error:
        where = printable(str(out or "runs"))
        raise ConfigError(
            f"Cannot write the run folder {where}: {error.strerror}; choose another --out."
        ) from None


def _create(out: Path | None, data: str, objective: str) -> Path:
    if out is not None:
        if out.exists() and not _only_bad_files(out):
            raise ConfigError(
                f"The run folder {printable(str(out))} exists; choose another --out, or continue it "
                f"with --resume {printable(str(out))}."
            )
        out.mkdir(parents=True, exist_ok=True)
        return out
    stem = re.sub(r"[^A-Za-z0-9_.]+", "-", Path(data).stem).strip("-.") or "data"
    name = f"{stem[:60]}-{objective}-{datetime.now().astimezone():%Y%m%d}"
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = runs / (name if number == 1 else f"{name}-{number}")
        if _only_bad_files(folder):
            return folder
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _only_bad_files(folder: Path) -> bool:
    return folder.is_dir() and [p.name for p in folder.iterdir()] == [BAD_FILES]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time trains in a run folder. Raises ConfigError when another one does.

    The lock is the kernel's: it ends with its process, however that ends, and workers do not inherit it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none; there two runs in one folder are the user's care
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another process is training in {printable(str(folder))}; wait for it or stop it first."
            ) from None
        yield


def describe(folder: Path, config: RunConfig, classes: Sequence[str], command: str) -> None:
    """Write config.yaml, classes.json and environment.json."""
    write_atomic(folder / CONFIG_FILE, to_yaml(config).encode())
    write_json(folder / "classes.json", list(classes))
    write_json(folder / "environment.json", environment(command))


def write_json(path: Path, value: Any) -> None:
    """One JSON file, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def environment(command: str) -> dict[str, Any]:
    """Versions and kind of machine; no names of hosts or people. command: as it was typed."""
    import os

    import torch

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": command,
        "python": platform.python_version(),
        "packages": packages,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def command_line() -> str:
    """What was typed, without the folder that the program lies in."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def stored_config(run: Path) -> RunConfig:
    """The resolved configuration of a run. Raises ModelError when `run` is no run folder."""
    path = run / CONFIG_FILE
    if not path.is_file():
        what = "is no run folder (no config.yaml)" if run.is_dir() else "does not exist"
        raise ModelError(
            f"The run {printable(str(run))} {what}; give the folder that train printed."
        )
    try:
        config: RunConfig = validate(RunConfig, read_yaml(path))
    except ConfigError as error:
        raise ModelError(f"{printable(str(path))} is damaged: {error}") from None
    return config


def stored_classes(run: Path) -> tuple[str, ...]:
    """The class map of a run."""
    try:
        names = json.loads((run / "classes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{printable(str(run))}/classes.json cannot be read.") from None
    return tuple(str(name) for name in names)
