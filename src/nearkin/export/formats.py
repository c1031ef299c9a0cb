"""Writes a model in each format, and runs it from its files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearkin.data.transforms import EvalSpec
from nearkin.errors import ExportError, first_line, printable
from nearkin.evaluation.model import Bundle
from nearkin.export.manifest import MODELS, TIMM, Format, Manifest
from nearkin.export.module import Exported, plain_backbone
from nearkin.files import write_atomic
from nearkin.imports import import_eager

Runner = Callable[[Tensor], Tensor]
LARGEST_ONNX = 1 << 30  # bytes of weights in one file; protobuf ends at 2 GiB
TRACED = (
    2  # images in the batch that a program is traced with; with 1 the size would be taken for fixed
)
# What timm needs of its description of a model; the rest describes weights that these are not.
TIMM_KEYS = (
    "custom_load",
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "pool_size",
    "first_conv",
    "classifier",
)


def trace(bundle: Bundle, *, raw: bool) -> torch.export.ExportedProgram:
    """The program of a model, for batches of any size, and without `raw` for images of any size.

    Raises ExportError when torch cannot trace the network.
    """
    module, spec = Exported(bundle, raw=raw), bundle.description.transform
    dynamic = torch.export.Dim.DYNAMIC
    if raw:
        images = torch.zeros(TRACED, spec.channels, spec.image_size, spec.image_size)
        dims = {0: dynamic}
    else:
        # Sides that differ from each other and from the network's, so that none is taken for another.
        high, wide = spec.resize + 3, spec.resize + 8
        images = torch.zeros(TRACED, high, wide, spec.channels, dtype=torch.uint8)
        dims = {0: dynamic, 1: dynamic, 2: dynamic}
    with _quiet(), _explained(f"torch cannot export {bundle.description.spec.model}"):
        return torch.export.export(module, (images,), dynamic_shapes=(dims,))


def write_torch(folder: Path, bundle: Bundle, *, raw: bool) -> None:
    """model.pt2: a program of torch.export."""
    program = trace(bundle, raw=raw)
    buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
    with _quiet():
        torch.export.save(program, buffer)
    write_atomic(folder / MODELS["torch"], buffer.getvalue())


def write_onnx(folder: Path, bundle: Bundle, manifest: Manifest) -> None:
    """model.onnx, with what the manifest says of the model as its metadata; above 1 GiB the weights in a file beside.

    Raises ExportError for operations without a translation.
    """
    program = trace(bundle, raw=manifest.raw)
    output = manifest.output
    with _quiet(), _explained(f"{bundle.description.spec.model} cannot be translated to ONNX"):
        translated = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=[output]
        )
    assert translated is not None
    record = manifest.model_dump(
        mode="json", exclude={"version", "kind", "checked", "files", "packages"}
    )
    translated.model.metadata_props.update(
        {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in record.items()
        }
    )
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    with _quiet():
        translated.save(folder / MODELS["onnx"], external_data=size > LARGEST_ONNX)


def write_timm(folder: Path, bundle: Bundle) -> None:
    """config.json and model.safetensors for `timm.create_model("local-dir:...", pretrained=True)`.

    Raises ExportError with the reason where timm has no such network.
    """
    from safetensors.torch import save

    description = bundle.description
    spec, transform = description.spec, description.transform
    classifier = timm_classifier(bundle)
    classes = len(spec.classes)
    options = {"in_chans": spec.channels, **spec.model_options}
    with _explained(f"timm cannot build {spec.model} with a classifier"):
        module, arguments = _timm_model(spec.model, options, classes, spec.image_size)
    _fill(module, plain_backbone(bundle), classifier, spec.model)
    side, channels = transform.image_size, spec.channels
    described = {
        "custom_load": False,
        "input_size": [channels, side, side],
        "interpolation": transform.interpolation,
        "crop_pct": crop_share(transform),
        "crop_mode": "center",
        "mean": bundle.network.mean.flatten().tolist(),
        "std": bundle.network.std.flatten().tolist(),
    }
    path = folder / TIMM
    import_eager("timm.models._hub").save_config_for_hf(
        module,
        path,
        model_config={"pretrained_cfg": described, "label_names": list(spec.classes)},
        model_args=arguments,
    )
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = config["pretrained_cfg"] | described
    config["pretrained_cfg"] = {name: kept[name] for name in TIMM_KEYS if name in kept}
    write_atomic(path, (json.dumps(config, indent=1) + "\n").encode())
    write_atomic(folder / MODELS["timm"], save(module.state_dict()))


def _timm_model(
    model: str, options: dict[str, Any], classes: int, image_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model with a classifier, and the arguments that it was built with, to build it again.

    Where the model depends on the size of the images, `img_size` is one of them.
    """
    timm = import_eager("timm")
    sized = options | {"img_size": image_size}
    try:
        return timm.create_model(model, num_classes=classes, **sized), sized
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(model, num_classes=classes, **options), options


def timm_classifier(bundle: Bundle) -> nn.Linear:
    """The classifier, where timm can hold it. Raises ExportError with the reason where it cannot."""
    spec, network = bundle.description.spec, bundle.network
    instead = "use --format onnx or torch"
    chain = network.chain("logits")
    if len(chain) > 1:
        raise ExportError(
            f"The classifier of this {spec.objective} model reads an embedding, not the features of {spec.model}, and "
            f"timm has no layers between the two; {instead}, or train with --objective.classifier features."
        )
    head = network.heads[chain[0]]
    if type(head) is not nn.Linear:
        raise ExportError(
            f"The classifier of this {spec.objective} model is no linear layer ({type(head).__name__}), and timm has "
            f"no other; {instead}."
        )
    if spec.stem == "small":
        raise ExportError(
            f"This model reads small images with other first layers than timm's {spec.model} (stem: small); {instead}, "
            "or train with --stem default."
        )
    return head


def _fill(module: nn.Module, backbone: nn.Module, classifier: nn.Linear, model: str) -> None:
    """Copies the trained weights into a timm model with a classifier (some have two, whose logits are averaged)."""
    found: Any = module.get_classifier()  # type: ignore[operator]
    layers = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    own, given = module.state_dict(), dict(backbone.state_dict())
    names = {id(part): name for name, part in module.named_modules()}
    for layer in layers:
        if isinstance(layer, nn.Linear) and layer.weight.shape == classifier.weight.shape:
            prefix = names[id(layer)]
            given |= {f"{prefix}.{name}": value for name, value in classifier.state_dict().items()}
    if given.keys() != own.keys() or any(own[name].shape != given[name].shape for name in own):
        raise ExportError(
            f"timm's {model} has other layers around its classifier than a linear one on the features; "
            "use --format onnx or torch."
        )
    module.load_state_dict(given)
    module.eval()


def crop_share(transform: EvalSpec) -> float:
    """The share that timm's transform takes: floor(image_size / share) is `resize` in floating point too."""
    share = transform.image_size / transform.resize
    while math.floor(transform.image_size / share) < transform.resize:
        share = math.nextafter(share, 0.0)
    return share


def load(folder: Path, kind: Format) -> Runner:
    """The model of a bundle as a function of a batch.

    Raises ExportError when its files cannot be loaded, and so does the function for images that it cannot take.
    """
    path = folder / MODELS[kind]
    shown = printable(str(path))
    with _quiet(), _explained(f"{shown} cannot be loaded"):
        model = {"onnx": _load_onnx, "torch": _load_torch, "timm": _load_timm}[kind](path)

    def run(images: Tensor) -> Tensor:
        with _explained(f"{shown} fails for images {list(images.shape)}"):
            return model(images)

    return run


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _load_torch(path: Path) -> Runner:
    module: Runner = torch.export.load(path).module()
    return module


def _load_timm(path: Path) -> Runner:
    folder = f"local-dir:{path.parent.absolute()}"
    module: nn.Module = import_eager("timm").create_model(folder, pretrained=True)
    return module.eval()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns any error inside the block into an ExportError: exporters and readers raise many kinds."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{what} ({type(error).__name__}: {first_line(error)}).") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters, which are about their own code."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "timm")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
