"""The command line: one thin file per verb. The top-level help is static, so that it answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

HELP = """\
nearkin trains image classifiers that learn from their near kin: neighbours of the same class.

usage: nearkin VERB ...

  train     [DATA]            train a classifier, from images to a run folder
  evaluate  RUN... [DATA]     exact metrics of a trained model; several are an ensemble
  predict   RUN IMAGES...     classes of image files and folders, as CSV or JSON
  fewshot   RUN DATA          accuracy on classes that the model has not seen, from a few images of each
  import-cone FILE            the CoNe authors' checkpoint as a run folder
  list      models|objectives|recipes

DATA is a built-in name (digits, offline), a torchvision name (cifar10, downloads), a folder of class folders
(with or without train/val/test), or a CSV/parquet table of path,label[,split]. Without DATA, train uses digits.

  nearkin VERB --help         the options of a verb
  nearkin --version

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 bug, 2 configuration, 3 data,
4 model or checkpoint, 5 export, 6 diverged or out of memory, 75 stopped and resumable.
"""

# Verb -> file. A file called list.py would hide the builtin in this package.
VERBS = {
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "fewshot": "fewshot",
    "import-cone": "import_cone",
    "list": "list_",
}


def run(argv: Sequence[str]) -> int:
    """Run one verb and return the exit code; errors become one sentence on stderr."""
    if sys.stdout is None:  # closed by the caller: results then go nowhere
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if argv[0] in ("-V", "--version"):
        from nearkin import __version__

        sys.stdout.write(f"nearkin {__version__}\n")
        return 0
    return _guarded(argv[0], list(argv[1:]))


def _guarded(verb: str, argv: list[str]) -> int:
    from nearkin.errors import ConfigError, NearkinError, nearest, printable

    debug = "--debug" in argv or bool(os.environ.get("NEARKIN_DEBUG"))
    rest = [word for word in argv if word != "--debug"]
    try:
        if verb not in VERBS:
            raise ConfigError(f"Unknown verb {verb}.{nearest(verb, VERBS)} See nearkin --help.")
        code: int = import_module(f"nearkin.cli.{VERBS[verb]}").main(rest)
        return code
    except NearkinError as error:
        if debug and error.code != 75:
            raise
        _tell("stopped" if error.code == 75 else "error", printable(str(error)), error)
        return error.code
    except BrokenPipeError:
        return _closed_pipe()
    except KeyboardInterrupt as error:
        _tell("stopped", "interrupted.", error)
        return 75
    except Exception as error:
        if debug:
            raise
        text = printable(f"{type(error).__name__}: {error}")
        _tell("bug", f"{text} (please report it; run again with --debug for the place)", error)
        return 1


def is_first() -> bool:
    """Whether this process tells the result: the first of those that torchrun or srun started."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _closed_pipe() -> int:
    """Whoever read our output has left; what was asked for is done or recorded elsewhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _tell(kind: str, text: str, error: BaseException) -> None:
    """Print an error, once where several processes were launched together."""
    from nearkin.process import launched

    if launched().world_size > 1:
        from nearkin.failures import report_failure

        report_failure(error)
    if not getattr(error, "reported_elsewhere", False):
        sys.stderr.write(f"nearkin: {kind}: {text}\n")
        sys.stderr.flush()
