"""Exports the model of a run to a folder that verifies itself, and verifies such a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from nearkin.config import CONFIG_FILE, RunConfig, stored
from nearkin.data.sources.resolve import resolve
from nearkin.errors import ConfigError, DataError, ModelError, counted, printable, to_install
from nearkin.evaluation.options import BadPolicy, check_choice, check_run
from nearkin.evaluation.own_data import check_place, split_options, stored_origin
from nearkin.export.manifest import (
    CHECK,
    VERSION,
    Checked,
    Format,
    Manifest,
    check_files,
    read_manifest,
    unlisted_note,
    write_manifest,
)
from nearkin.files import write_atomic

if TYPE_CHECKING:
    from nearkin.data.dataset import Split
    from nearkin.data.sources.listing import Listing
    from nearkin.evaluation.model import Bundle
    from nearkin.export.formats import Runner

EXTRA = ("onnx", "onnxscript", "onnxruntime")
PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("torch", "timm", *EXTRA),
    "timm": ("torch", "timm"),
    "torch": ("torch", "timm"),
}
TRUST = (
    "a bundle is only as trustworthy as its source: checksums show damage, not who made the files"
)


class Bundled(NamedTuple):
    """A bundle that was written or verified. notes: sentences for a person."""

    folder: Path
    manifest: Manifest
    largest_difference: float
    notes: tuple[str, ...]


def export(
    run: str | Path,
    format: Format,
    *,
    raw: bool = False,
    out: str | Path | None = None,
    data: str | Path | None = None,
    bad_images: BadPolicy | None = None,
    log: Callable[[str], object] = lambda _: None,
) -> Bundled:
    """Write the model of a run as `onnx`, `timm` or `torch` to a new folder, whole or not at all.

    raw: the model takes normalised images and gives logits; otherwise it takes decoded images of any size (uint8
    `[N, H, W, C]`) and gives probabilities. timm models are raw always. out: the folder, by default RUN/export-FORMAT.
    data: images to compare with nearkin's own outputs; by default the validation images of the run, else its test
    images, else those it was trained on. bad_images: `error` or `skip`; by default as in the training. log: called
    with a sentence before each long step.

    Raises ExportError when the exported model gives other classes than nearkin, or the network cannot be exported;
    ModelError when `run` has no finished model with a classifier; DataError for images that are missing; ConfigError
    when `out` exists or a package is missing.
    """
    check_choice("format", format, Format)
    if bad_images is not None:
        check_choice("bad-images", bad_images, BadPolicy)
    run = Path(run)
    check_run(run)
    target = run / f"export-{format}" if out is None else Path(out)
    _check_target(target)
    _check_packages(format)
    options = run / CONFIG_FILE
    config = stored(RunConfig, options) if options.is_file() else None
    listing = resolve(str(data)) if data is not None else _own_data(run, config)
    import torch

    from nearkin.evaluation.model import load_bundle

    bundle = load_bundle(run, torch.device("cpu"))
    if not bundle.network.classifies:
        raise ModelError(
            f"The model of {printable(str(run))} has no classifier, so it cannot be exported."
        )
    split, notes = _split(run, bundle, listing, config, own=data is None, bad_images=bad_images)
    raw = raw or format == "timm"
    with _whole(target) as folder:
        log(f"writing the {format} model")
        runner = _write_model(folder, bundle, format, raw)
        log(f"comparing it with nearkin on {counted(len(split.labels), f'{split.name} image')}")
        manifest = _complete(folder, bundle, describe(bundle, format, raw), runner, split, config)
    return Bundled(target, manifest, manifest.checked.largest_difference, notes)


def verify(folder: str | Path) -> Bundled:
    """Compare the files of a bundle with their checksums, then run the model on the check inputs stored with it.

    Nothing is loaded before all checksums agree. Raises ExportError when anything differs, ConfigError when a package
    is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    others = check_files(folder, manifest)
    _check_packages(manifest.kind)
    from nearkin.export.agreement import check_bundle
    from nearkin.export.formats import load

    largest = check_bundle(folder, manifest, load(folder, manifest.kind))
    notes = (TRUST, *([unlisted_note(others)] if others else []))
    return Bundled(folder, manifest, largest, notes)


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(
            f"The folder {printable(str(target))} exists; choose another --out, or delete it."
        )


def _check_packages(format: Format) -> None:
    if format == "onnx" and not all(find_spec(name) for name in EXTRA):
        raise ConfigError(
            f"ONNX models need onnx, onnxscript and onnxruntime; {to_install('export')}."
        )


def _own_data(run: Path, config: RunConfig | None) -> Listing:
    """The data that a run was trained on. Raises DataError when they are not known or no longer there."""
    advice = "give labelled images to compare on with --data"
    if config is None:
        raise DataError(f"The run has no {CONFIG_FILE} that names its images; {advice}.")
    try:
        listing = resolve(config.data)
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; put them back, or {advice}.") from None
    check_place(listing, config.data, stored_origin(run), advice)
    return listing


def _split(
    run: Path,
    bundle: Bundle,
    listing: Listing,
    config: RunConfig | None,
    *,
    own: bool,
    bad_images: BadPolicy | None,
) -> tuple[Split, tuple[str, ...]]:
    """The images to compare on: validation, else test, else training images; and notes. Where the validation images of
    the run cannot be told from its training images any more, the others."""
    from nearkin.data.dataset import load_for_evaluation, names_of

    options: dict[str, Any] = {}
    origin = stored_origin(run) if own else None
    if config is not None:
        options = split_options(config, origin) if own else {}
        options["bad_images"] = config.bad_images
    if bad_images is not None:
        options["bad_images"] = bad_images
    carved = own and "train" in listing.parts and options.get("val_split", 0) > 0
    if carved and origin is not None and origin.names != names_of(listing):
        carved = False
        options |= {"val_split": 0.0, "images_per_class": None}
    there = ["val"] if carved else []
    there += [name for name in ("val", "test", "train") if name in listing.parts]
    name = None if not own and there == ["train"] else there[0]
    spec = bundle.description.spec
    found = load_for_evaluation(
        listing, classes=spec.classes, channels=spec.channels, split=name, own=own, **options
    )
    return found.split, found.notes


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder that gets the name `target` at the end of the block, and is removed when the block fails."""
    anchor = next(parent for parent in target.absolute().parents if parent.is_dir())
    folder = anchor / f".tmp-{target.name}-{uuid4().hex[:12]}"
    try:
        folder.mkdir()
        try:
            yield folder
            _check_target(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"The folder {printable(str(target))} cannot be written ({error.strerror or error}); choose another --out."
        ) from error


def _write_model(folder: Path, bundle: Bundle, format: Format, raw: bool) -> Runner:
    """Write the files of the model and load it from them. Raises ExportError."""
    from nearkin.export import formats

    if format == "onnx":
        formats.write_onnx(folder, bundle, describe(bundle, format, raw))
    elif format == "torch":
        formats.write_torch(folder, bundle, raw=raw)
    else:
        formats.write_timm(folder, bundle)
    return formats.load(folder, format)


def _complete(
    folder: Path,
    bundle: Bundle,
    manifest: Manifest,
    runner: Runner,
    split: Split,
    config: RunConfig | None,
) -> Manifest:
    """Compare the model, then write check inputs, card and manifest. Raises ExportError when it disagrees."""
    from safetensors.torch import save

    from nearkin.export import agreement
    from nearkin.export.card import NAME, card

    raw = manifest.raw
    expected = agreement.Expected(bundle, raw=raw, logits=manifest.output == "logits")
    checked = agreement.agree_on(split, runner, expected, raw=raw)
    manifest = manifest.model_copy(update={"checked": checked})
    write_atomic(folder / CHECK, save(agreement.check_tensors(expected, raw=raw)))
    agreement.check_bundle(folder, manifest, runner)
    write_atomic(folder / NAME, card(bundle.description, manifest, config).encode())
    return write_manifest(folder, manifest)


def _version(package: str) -> str:
    """Of what is imported by this name, which may come from a distribution of another one, as onnxruntime-gpu."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(import_module(package).__version__)


def describe(bundle: Bundle, format: Format, raw: bool) -> Manifest:
    """The manifest of a model, before it was compared with anything."""
    description, network = bundle.description, bundle.network
    from nearkin.export.module import temperature

    transform = description.transform
    side, channels = transform.image_size, transform.channels
    taken = f"uint8 [N, H, W, {channels}], decoded upright images of any height and width"
    if raw:
        taken = f"float32 [N, {channels}, {side}, {side}], (pixels / 255 - mean) / std of the resized and cropped image"
    return Manifest(
        version=VERSION,
        nearkin=version("nearkin"),
        kind=format,
        raw=raw,
        input=taken,
        output="logits" if raw else "probabilities",
        classes=bundle.classes,
        temperature=temperature(bundle),
        transform=transform.model_dump(mode="json"),
        mean=tuple(network.mean.flatten().tolist()),
        std=tuple(network.std.flatten().tolist()),
        packages={name: _version(name) for name in PACKAGES[format]},
        checked=Checked(split="", images=0, batch_sizes=(), largest_difference=0.0),
        files={},
    )
