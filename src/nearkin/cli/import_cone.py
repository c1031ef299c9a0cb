"""nearkin import-cone FILE"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, ModelError, counted, printable

if TYPE_CHECKING:
    from nearkin.contrib.cone_import import Imported

USAGE = "nearkin import-cone FILE [--out RUN] [--classes NAMES] [--json]"
ABOUT = "The CoNe authors' checkpoint as a run folder for evaluate, predict and train --weights."


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("file", nargs="?", metavar="FILE", help="the published .pth file")
    parser.add_argument(
        "--out", metavar="RUN", help="folder to make (must not exist) [runs/NAME-cone-DATE]"
    )
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="text file, one class name a line, or .json list, in the classifier's order [000, 001, ...]",
    )
    parser.flag("json", "one JSON object on stdout")
    return parser


def main(given: dict[str, Any]) -> int:
    if given.get("file") is None:
        raise ConfigError("Import which file? Give the checkpoint of the CoNe authors.")
    out = Path(given["out"]) if "out" in given else None
    if out is not None and out.exists():  # before gigabytes are read
        raise ConfigError(f"The run folder {printable(str(out))} exists; choose another --out.")
    file = Path(given["file"])
    if not file.exists():
        raise ModelError(f"The checkpoint {printable(str(file))} does not exist.")
    from nearkin.contrib.cone_import import read_class_names, read_cone_checkpoint

    names = read_class_names(Path(given["classes"])) if "classes" in given else None
    imported = read_cone_checkpoint(file, names)
    run, spec = _write(imported, out, file.stem), imported.description.spec
    classes = counted(len(spec.classes), "class", "classes")
    record = {"run": str(run), "model": spec.model, "classes": len(spec.classes)}
    text = f"{spec.model} for {classes}\nrun {printable(str(run))}\n"
    show(record, text, as_json=given.get("json", False))
    return 0


def _write(imported: Imported, out: Path | None, name: str) -> Path:
    """The run folder, whole or not at all."""
    from nearkin.evaluation.model import save_bundle
    from nearkin.evaluation.own_data import Origin
    from nearkin.training import run_folder
    from nearkin.training.metrics_log import Journal

    description, weights, config = imported
    run = run_folder.create(out, data=name, objective=config.objective)
    try:
        run_folder.describe(run, config, description.spec.classes)
        # The digest of no folder: whatever has the name of config.data is not known to be what the authors had.
        unknown = Origin(names="", sizes="", place="")
        run_folder.write_origin(run, config, identity=unknown.record())
        save_bundle(run, description, weights)
        Journal(run).status(
            "finished", step=0, steps=0, epoch=0, message="imported, not trained here"
        )
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return run
