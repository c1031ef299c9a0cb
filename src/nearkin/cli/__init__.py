"""The command line: one file per verb, with `parser()` and `main(given)`.

The top-level help is static, since importing the verbs takes 0.2 s.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

HELP = """\
nearkin trains image classifiers from folders of photos, and shows the training images nearest to each prediction.

usage: nearkin COMMAND ...

  doctor    DATA              what is wrong with a data set, before training
  train     [DATA]            train a classifier, from images to a run folder
  compare   [DATA]            several objectives on equal terms: does another one help on my data?
  evaluate  RUN... [DATA]     exact metrics of a trained model; several are an ensemble
  predict   RUN IMAGES...     classes of images and the evidence for them, as CSV, JSON or Parquet
  embed     RUN IMAGES|DATA   embeddings of images, as npz or Parquet
  export    RUN               an ONNX, timm or torch.export model, checked against nearkin's own numbers
  report    RUN...            a page to look at: errors, a map, the nearest training images of each image
  fewshot   RUN DATA          accuracy on classes that the model has not seen, from a few images of each
  import-cone FILE            the CoNe authors' checkpoint as a run folder
  list      models|objectives|recipes

DATA is a built-in name (digits, offline), a torchvision name (cifar10, downloads), a folder of class folders
(with or without train/val/test), or a CSV/parquet table of path,label[,split]. Without DATA, train uses digits.

  nearkin COMMAND --help      its options; --no-NAME turns a switch off, as in --no-flip
  nearkin --version

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 bug, 2 configuration, 3 data,
4 model or checkpoint, 5 export, 6 diverged or out of memory, 75 stopped and resumable.
"""

# Verb -> module. A module `list` would hide the builtin in this package.
VERBS = {
    "doctor": "doctor",
    "train": "train",
    "compare": "compare",
    "evaluate": "evaluate",
    "predict": "predict",
    "embed": "embed",
    "export": "export",
    "report": "report",
    "fewshot": "fewshot",
    "import-cone": "import_cone",
    "list": "list_",
}
# Those that several processes would each do for themselves.
ONE_PROCESS = frozenset(
    ("doctor", "predict", "embed", "export", "report", "fewshot", "import-cone")
)
# What other tools call them.
OTHERS = {
    **dict.fromkeys(("fit", "finetune", "fine-tune"), "train"),
    **dict.fromkeys(("val", "validate", "test", "eval", "ensemble"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "classify"), "predict"),
    **dict.fromkeys(("features", "extract"), "embed"),
    **dict.fromkeys(("check", "lint"), "doctor"),
    "tune": "compare --tune",
    "benchmark": "compare",
}


# What the system says of a path that nobody may use, or cannot exist.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


def run(argv: Sequence[str]) -> int:
    """Run one verb and return the exit code; errors become one sentence on stderr."""
    from nearkin.errors import DivergedError, NearkinError, is_out_of_memory, printable

    debug = "--debug" in argv or bool(os.environ.get("NEARKIN_DEBUG"))
    try:
        code = _run([word for word in argv if word != "--debug"])
        sys.stdout.flush()  # here, where a full disk can still be reported
        return code
    except NearkinError as error:
        if debug and error.code != 75:
            traceback.print_exc()
        _report("stopped" if error.code == 75 else "error", printable(str(error)), error)
        return error.code
    except BrokenPipeError:  # the reader of stdout, like `head`, has what it wanted
        return 0
    except KeyboardInterrupt as error:
        _report("stopped", "interrupted.", error)
        return 75
    except Exception as error:
        if debug:
            traceback.print_exc()
        if is_out_of_memory(error):
            text = "The memory ran out; end other programs that use it, or give --device cpu."
            _report("error", text, error)
            return DivergedError.code
        name = error.filename if isinstance(error, OSError) and error.errno in REFUSED else None
        if isinstance(error, OSError) and isinstance(name, str | bytes):
            path = printable(os.fsdecode(name))
            _report("error", f"{path} cannot be used: {error.strerror}.", error)
            return 2
        text = printable(f"{type(error).__name__}: {error}")
        _report(
            "bug", f"{text} (please report it; run again with --debug for the traceback)", error
        )
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if argv[0] in ("-V", "--version"):
        from nearkin import __version__

        sys.stdout.write(f"nearkin {__version__}\n")
        return 0
    from nearkin.errors import ConfigError

    verb, *rest = argv
    if verb not in VERBS:
        from nearkin.errors import nearest, printable

        meant = OTHERS.get(verb.casefold())
        hint = f" Did you mean {meant}?" if meant else nearest(verb, VERBS)
        raise ConfigError(f"Unknown verb {printable(verb)}.{hint} See nearkin --help.")
    from nearkin.process import interrupt, launched, stop_handler

    with stop_handler(interrupt):  # so that what was begun is removed
        module = import_module(f"nearkin.cli.{VERBS[verb]}")
        parser = module.parser()
        given = parser.read(rest)
        if given.pop("help", False):
            sys.stdout.write(parser.help(given))
            return 0
        if verb in ONE_PROCESS and launched().world_size > 1:
            raise ConfigError(f"nearkin {verb} is one process; start it without torchrun or srun.")
        code: int = module.main(given)
        return code


def show(
    record: dict[str, Any],
    text: str,
    *,
    as_json: bool,
    notes: Sequence[str] = (),
    kind: str = "note",
) -> None:
    """Print a result as text or as one JSON object, and notes on stderr; of several ranks only the first does."""
    from nearkin.errors import printable
    from nearkin.process import launched

    if launched().rank != 0:
        return
    sys.stderr.writelines(f"{kind}: {printable(note)}\n" for note in notes)
    if as_json:
        record = {"run": record["run"], "test_top1": None} | record
        text = json.dumps(record, allow_nan=False) + "\n"
    sys.stdout.write(text)


def _report(kind: str, text: str, error: BaseException) -> None:
    """Print an error, once where several processes were launched together."""
    from nearkin.errors import ConfigError
    from nearkin.process import launched

    try:
        several = launched().world_size > 1
    except ConfigError:  # the error that is reported
        several = False
    if several:
        from nearkin.distributed import report_failure

        report_failure(error)
    if not getattr(error, "reported_elsewhere", False):
        with suppress(OSError, ValueError):  # a terminal that was closed
            sys.stderr.write(f"nearkin: {kind}: {text}\n")
            sys.stderr.flush()
