"""nearkin embed RUN IMAGES|DATA --out FILE"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from nearkin.evaluation.embed import Embedded, Labelled

USAGE = "nearkin embed RUN IMAGES|DATA --out FILE.npz|FILE.parquet [--tta NAME]"
ABOUT = """\
The embeddings of images, with their paths; of DATA (see nearkin --help) with labels and splits as well.
IMAGES: files, folders (searched), quoted patterns ("new/**/*.jpg"), - for a list of paths on stdin."""
SUFFIXES = (".npz", ".parquet")


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument("images", nargs="*", metavar="IMAGES|DATA", help="what to embed")
    parser.add_argument("--out", metavar="FILE", help="where to: .npz or .parquet")
    parser.add_argument("--tta", metavar="NAME", help="views: none, flip or tencrop [none]")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or mps [auto]")
    parser.flag("json", "one JSON object on stdout: files, images, and the width of a row")
    return parser


def main(given: dict[str, Any]) -> int:
    if not given.get("run") or not given.get("images"):
        raise ConfigError("Embed what? Give a run folder, then images or DATA.")
    from nearkin.cli import show
    from nearkin.cli.rows import check_out, check_pyarrow
    from nearkin.evaluation.predict import check_arguments, load
    from nearkin.files import write_atomic

    run, out = given["run"], Path(given.get("out") or "")
    if out.suffix not in SUFFIXES:
        raise ConfigError("Embed where? Give --out FILE.npz or --out FILE.parquet.")
    check_out(out)
    if out.suffix == ".parquet":
        check_pyarrow()
    options: dict[str, Any] = {
        "tta": given.get("tta", "none"),
        "device": given.get("device", "auto"),
        "kin": 0,
    }
    check_arguments(run, **options)
    images, notes = _images(given["images"])
    from nearkin.evaluation.embed import embed

    found = embed(load(run, **options), images, quiet=False)
    write_atomic(out, _npz(found) if out.suffix == ".npz" else _parquet(found))
    count, width = found.embeddings.shape
    text = f"{count} x {width} embeddings in {printable(str(out))}\n"
    record = {"run": run, "out": str(out), "images": count, "width": width, "bad": found.bad}
    show(record, text, as_json=given.get("json", False), notes=notes)
    if found.bad:
        sys.stdout.flush()
        path, reason = found.bad[0]
        raise DataError(
            f"{len(found.bad)} of {count + len(found.bad)} files could not be read and were left out, such as "
            f"{printable(path)} ({reason})."
        )
    return 0


def _images(words: list[str]) -> tuple[Labelled, list[str]]:
    """One word may be DATA."""
    from nearkin.cli.images import image_files
    from nearkin.evaluation.embed import Labelled, as_data, labelled

    listing, notes = as_data(words[0]) if len(words) == 1 else (None, [])
    if listing is not None:
        return labelled(listing), notes
    files, more = image_files(words)
    return Labelled(files, files), [*notes, *more]


def _npz(found: Embedded) -> bytes:
    """Arrays without pickled objects, so that `numpy.load` reads them as they are."""
    import numpy as np

    columns = {"paths": found.paths, "labels": found.labels, "splits": found.splits}
    arrays: dict[str, Any] = {
        name: np.array(texts) for name, texts in columns.items() if texts is not None
    }
    buffer = io.BytesIO()
    np.savez(buffer, embeddings=found.embeddings, **arrays)
    return buffer.getvalue()


def _parquet(found: Embedded) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    from nearkin.cli.rows import valid_text

    columns = {"path": found.paths, "label": found.labels, "split": found.splits}
    arrays: dict[str, Any] = {
        name: pa.array(valid_text(texts)) for name, texts in columns.items() if texts is not None
    }
    width = found.embeddings.shape[1]
    arrays["embedding"] = pa.FixedSizeListArray.from_arrays(
        pa.array(found.embeddings.reshape(-1)), width
    )
    buffer = io.BytesIO()
    parquet.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()
