"""nearkin predict RUN IMAGES..."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

from nearkin.cli.arguments import Parser, number, whole_number
from nearkin.errors import ConfigError, DataError, ModelError, counted, printable

if TYPE_CHECKING:
    from nearkin.evaluation.classifier import Classifier
    from nearkin.evaluation.results import Prediction
    from nearkin.report.sheets import Sheets

USAGE = "nearkin predict RUN IMAGES... [--kin N] [--reject X] [--sets X] [--explain DIR] [--format NAME] [--out FILE]"
ABOUT = """\
The class of each image and the evidence for it, as CSV on stdout.
IMAGES: files, folders (searched), quoted patterns ("new/**/*.jpg"), - for a list of paths on stdin."""


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument("images", nargs="*", metavar="IMAGES", help="files, folders, patterns or -")
    parser.add_argument("--kin", metavar="N", help="nearest training images to name [3]")
    parser.add_argument(
        "--reject",
        metavar="X",
        help='class "unknown" for images farther from their kin than all but this share of validation [none]',
    )
    parser.add_argument(
        "--sets", metavar="X", help="classes that hold the right one in this share of images [none]"
    )
    parser.add_argument(
        "--explain", metavar="DIR", help="a picture per image: its kin, its classes"
    )
    parser.add_argument("--format", metavar="NAME", help="csv, json, jsonl or parquet [csv]")
    parser.add_argument("--out", metavar="FILE", help="write there instead of stdout")
    parser.add_argument("--tta", metavar="NAME", help="views: none, flip or tencrop [none]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.flag("json", "one JSON object; the same as --format json")
    return parser


def main(given: dict[str, Any]) -> int:
    if not given.get("run") or not given.get("images"):
        raise ConfigError("Predict what? Give a run folder, then image files or folders.")
    from nearkin.cli.images import image_files
    from nearkin.cli.rows import choose_format, write_rows
    from nearkin.evaluation.predict import check_arguments, load

    run, explain = given["run"], given.get("explain")
    chosen, out = choose_format(given)
    options: dict[str, Any] = {
        "kin": whole_number("kin", given.get("kin", "3")),
        "reject": number("reject", given.get("reject")),
        "sets": number("sets", given.get("sets")),
        "tta": given.get("tta", "none"),
        "device": given.get("device", "auto"),
    }
    # Before a folder of many images is searched.
    check_arguments(run, **options, explain=explain is not None)
    if explain is not None:
        from nearkin.report.sheet_folder import check_folder

        check_folder(Path(explain))
    files, notes = image_files(given["images"])
    if explain is not None:
        files, notes = _without_sheets(files, notes, Path(explain))
    for note in notes:
        _say(f"note: {note}")
    model = load(run, **options)
    for note in model.notes:
        _say(f"note: {note}")
    _say_coverage(model, options["sets"])
    sheets = None
    if explain is not None:
        from nearkin.report.sheets import Sheets

        sheets = Sheets(Path(explain), files, model.run)
        if sheets.missing is not None:
            _say(f"note: the sheets have no pictures of kin: {sheets.missing}")
    rows = _Counted(_predictions(model, files, sheets, quiet=out is None and _is_terminal()))
    write_rows(rows, run, chosen, out)
    if rows.bad:
        sys.stdout.flush()
        raise DataError(f"{rows.bad} of {len(files)} files could not be read; their rows say why.")
    return 0


def _without_sheets(
    files: list[str], notes: list[str], folder: Path
) -> tuple[list[str], list[str]]:
    """Without the sheets of an earlier call among the images, and a note of them."""
    from nearkin.report.sheet_folder import without_sheets

    kept = without_sheets(files, folder)
    sheets, shown = len(files) - len(kept), printable(str(folder))
    if not kept:
        raise DataError(f"All {len(files)} images are sheets in {shown}; give other images.")
    if sheets:
        notes = [*notes, f"{counted(sheets, 'sheet')} of an earlier call in {shown} left out"]
    return kept, notes


class _Counted:
    """Predictions, of which those with an error are counted in `bad`."""

    def __init__(self, predictions: Iterator[Prediction]) -> None:
        self._predictions, self.bad = predictions, 0

    def __iter__(self) -> Iterator[Prediction]:
        for one in self._predictions:
            self.bad += one.error is not None
            yield one


def _predictions(
    model: Classifier, files: list[str], sheets: Sheets | None, *, quiet: bool
) -> Iterator[Prediction]:
    """The predictions, whose sheets are written. quiet: without a bar on stderr."""
    from nearkin.data.look import shown

    batches = shown(model.batches(files), len(files), "images classified", quiet)
    for row, one in enumerate(chain.from_iterable(batches)):
        if sheets is not None:
            sheets.write(row, one)
        yield one


def _is_terminal() -> bool:
    """Whether stdout is one: then the rows that appear there show the progress."""
    with suppress(ValueError, AttributeError):
        return sys.stdout.isatty()
    return False


def _say_coverage(model: Classifier, sets: float | None) -> None:
    if sets is None:
        return
    from nearkin.data.look import QUIET_SECONDS

    words = "the sets are measured on the run's test images, once ..."
    slow = Timer(QUIET_SECONDS, _say, [words])
    slow.start()
    try:
        found = model.coverage()
    except (ConfigError, DataError, ModelError) as error:
        _say(f"note: sets of {100 * sets:g} %: coverage not measured: {error}")
        return
    finally:
        slow.cancel()
    if found is not None:
        _say(
            f"sets of {100 * sets:g} %: measured coverage {100 * found.share:.1f} % on {found.images} test images, "
            f"{found.classes:.2f} classes in the mean"
        )


def _say(text: str) -> None:
    sys.stderr.write(f"{printable(text)}\n")
