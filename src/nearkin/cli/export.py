"""nearkin export RUN --format NAME, nearkin export --verify DIR"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nearkin.cli import show
from nearkin.cli.arguments import Parser
from nearkin.errors import ConfigError, counted, printable

if TYPE_CHECKING:
    from nearkin.export.api import Bundled

USAGE = (
    "nearkin export RUN --format onnx|timm|torch [--raw] [--out DIR] [--data DATA] [--json]\n"
    "       nearkin export --verify DIR [--json]"
)
ABOUT = (
    "A trained model for other programs, in a folder with a card, checksums and check inputs.\n"
    "It is compared with nearkin's own outputs on the validation images at two batch sizes; when a class\n"
    "differs, nothing is written."
)


def parser() -> Parser:
    parser = Parser(USAGE, ABOUT)
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder that train printed")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="onnx (onnxruntime), timm (timm.create_model, hub) or torch (torch.export)",
    )
    parser.flag("raw", "normalised images in and logits out; timm always [false]")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to make (must not exist) [RUN/export-FORMAT]"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="images to check on [the run's validation images, else test, else train]",
    )
    parser.add_argument(
        "--bad-images",
        dest="bad_images",
        metavar="NAME",
        help="unreadable images: error stops, skip leaves them out [as in the training]",
    )
    parser.add_argument("--verify", metavar="DIR", help="check an exported folder again")
    parser.flag("json", "one JSON object on stdout")
    return parser


def main(given: dict[str, Any]) -> int:
    as_json = given.pop("json", False)
    if "verify" in given:
        return _verify(given, as_json)
    if "run" not in given or given["run"] is None:
        raise ConfigError("Export which run? Give the folder that train printed.")
    if "format" not in given:
        raise ConfigError("Export to which format? Give --format onnx, timm or torch.")
    from nearkin.export.api import export

    found = export(
        given["run"],
        given["format"],
        raw=given.get("raw", False),
        out=given.get("out"),
        data=given.get("data"),
        bad_images=given.get("bad_images"),
        log=lambda text: sys.stderr.write(f"{text} ...\n"),
    )
    checked = found.manifest.checked
    lines = [
        f"checked    {checked.images} {checked.split} images at batch sizes "
        f"{' and '.join(map(str, checked.batch_sizes))}: top-1 agrees on 100 %, largest difference "
        f"{found.largest_difference:.1e}",
        f"next       nearkin export --verify {printable(str(found.folder))}",
    ]
    _show(found, {"run": given["run"]} | checked.model_dump(mode="json"), lines, as_json=as_json)
    return 0


def _verify(given: dict[str, Any], as_json: bool) -> int:
    others = [name for name in given if name != "verify" and given[name] is not None]
    if others:
        raise ConfigError(f"--verify takes a folder and nothing else; leave out {others[0]}.")
    from nearkin.export.api import verify

    found = verify(given["verify"])
    lines = [
        f"verified   {counted(len(found.manifest.files), 'file')} as exported, outputs within "
        f"{found.largest_difference:.1e} of those stored",
    ]
    record = {"run": None, "largest_difference": found.largest_difference}
    _show(found, record, lines, as_json=as_json)
    return 0


def _show(found: Bundled, record: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    manifest = found.manifest
    head = [
        f"folder     {printable(str(found.folder))}",
        f"format     {manifest.kind}: {printable(manifest.input)} -> {manifest.output} [N, {len(manifest.classes)}]",
    ]
    record = record | {
        "folder": str(found.folder),
        "format": manifest.kind,
        "raw": manifest.raw,
        "files": sorted(manifest.files),
    }
    show(record, "\n".join([*head, *lines]) + "\n", as_json=as_json, notes=found.notes)
