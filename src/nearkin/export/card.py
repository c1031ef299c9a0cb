"""The model card of a bundle: README.md, from the run alone."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from nearkin.config import RunConfig
from nearkin.errors import counted, printable
from nearkin.export.manifest import MODELS, Format, Manifest
from nearkin.imports import import_eager
from nearkin.network import PACKAGED

if TYPE_CHECKING:
    from nearkin.evaluation.model import Description

NAME = "README.md"
SHOWN = 20  # classes
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~^$:@])")


class Origin(NamedTuple):
    """The weights that a training started from, in a sentence, and their licence as the hub names it, if known."""

    sentence: str
    licence: str | None


def escaped(text: str) -> str:
    """`text` on one line, with nothing that Markdown or HTML would read as markup."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", plain)


def origin(config: RunConfig | None, model: str, *, imported: bool) -> Origin:
    """Where the weights of a run come from. config: None where the run has none that can be read."""
    if imported:
        return Origin(
            "The weights are those of a file of others. Their licence is not known here and holds for this model.",
            None,
        )
    if config is None:
        return Origin(
            "It is not known which weights the training started from, nor their licence.", None
        )
    if config.weights is not None:
        return Origin(
            "The training started from a file of weights. Their licence is not known here and holds for this model.",
            None,
        )
    if not config.pretrained:
        return Origin(
            "The training started from random weights, so no other licence is involved.", None
        )
    if model in PACKAGED:
        return Origin(
            f"The training started from the ImageNet weights of {escaped(model)} in the package "
            f"{escaped(PACKAGED[model].distribution)}, Apache License 2.0. This model is derived from them: keep their "
            "notice with it.",
            "apache-2.0",
        )
    published = import_eager("timm").get_pretrained_cfg(model)
    licence = getattr(published, "license", None)
    known = (
        f"under the licence {escaped(licence)}" if licence else "whose licence timm does not name"
    )
    return Origin(
        f"The training started from timm's pretrained weights of {escaped(model)}, {known}. This model is derived from "
        "them, so their terms hold for it too.",
        licence,
    )


def card(description: Description, manifest: Manifest, config: RunConfig | None) -> str:
    """The Markdown text. Nothing in it comes from outside of the run, and every name is escaped."""
    spec = description.spec
    came = origin(config, spec.model, imported=description.imported)
    made = "imported" if description.imported else "trained"
    data = "unknown data"
    if config is not None and not description.imported:
        data = escaped(os.path.basename(config.data.rstrip("/\\")))  # noqa: PTH119
    count = counted(len(spec.classes), "class", "classes")
    sections = [
        f"# {escaped(spec.model)} for {count} of {data}",
        f"An image classifier, {made} by nearkin {escaped(description.nearkin)} with the objective "
        f"{escaped(spec.objective)}.",
        "## Use\n\n" + _use(manifest),
        f"## Data\n\nTrained on {data}. Classes, in the order of the outputs: {_classes(spec.classes)}.",
        "## Numbers\n\n" + _numbers(description.metrics, manifest),
        "## Limits\n\n" + _limits(description, manifest),
        f"## Licence\n\n{came.sentence} The licence of the images is not known here.",
    ]
    return _head(manifest.kind, came.licence) + "\n\n".join(sections) + "\n"


def _head(kind: Format, licence: str | None) -> str:
    """The block of YAML that model hubs read."""
    library = {"library_name": "timm"} if kind == "timm" else {}
    record = {
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "nearkin", kind],
        **library,
        **({"license": licence} if licence else {}),
    }
    return f"---\n{yaml.safe_dump(record, sort_keys=False)}---\n\n"


def _classes(classes: tuple[str, ...]) -> str:
    named = ", ".join(escaped(name) for name in classes[:SHOWN])
    more = len(classes) - SHOWN
    return f"{named} and {more} more (all are in manifest\\.json)" if more > 0 else named


def _numbers(metrics: dict[str, Any], manifest: Manifest) -> str:
    checked, rows = manifest.checked, []
    if metrics:
        low, high = metrics["interval"]
        rows = [
            ("images", f"{metrics['n']} ({escaped(str(metrics['split']))} split)"),
            (
                "top\\-1 accuracy",
                f"{_percent(metrics['top1'])}, 95 % interval {_percent(low)} to {_percent(high)}",
            ),
            ("top\\-5 accuracy", _percent(metrics["top5"])),
            ("mean F1 of the classes", _percent(metrics["macro"]["f1"])),
            ("log loss", f"{metrics['log_loss']:.4f} nats, before the temperature"),
            ("calibration error (ECE)", f"{_percent(metrics['ece'])}, before the temperature"),
        ]
    rows += [
        ("temperature", f"{manifest.temperature:.4g}"),
        (
            "compared with nearkin",
            f"{checked.images} {escaped(checked.split)} images at batch sizes "
            f"{' and '.join(map(str, checked.batch_sizes))}: the same classes, largest difference "
            f"{checked.largest_difference:.1e} ({manifest.output})",
        ),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _limits(description: Description, manifest: Manifest) -> str:
    metrics, transform = description.metrics, description.transform
    lines = [
        f"Every image gets one of {len(manifest.classes)} classes, also one that shows none of them.",
        "The numbers hold for images like those of the split above, not for other cameras, places or times.",
        f"It sees the centre of an image at {transform.image_size} x {transform.image_size} pixels, and of images "
        "longer than 8 to 1 only the middle.",
    ]
    if metrics.get("split") == "val":
        lines.append(
            "The validation images also chose the best epoch, so the accuracy is slightly too good."
        )
    if not metrics:
        lines.append("No accuracy was measured with the training.")
    worst = metrics.get("most_confused")
    if worst:
        images = counted(worst["images"], "image")
        lines.append(
            f"Most often confused: {escaped(worst['true'])}, taken for {escaped(worst['predicted'])} ({images})."
        )
    if manifest.kind == "timm" or not manifest.raw:
        lines.append(
            "nearkin lays transparent pixels on white and scales 16 bits per channel to 8; the lines above do not."
        )
    if description.temperature is None:
        lines.append("No temperature was fitted, so the probabilities may be too sure.")
    return "\n".join(f"- {line}" for line in lines)


def _use(manifest: Manifest) -> str:
    file, channels = MODELS[manifest.kind], manifest.transform["channels"]
    side = manifest.transform["image_size"]
    give = f"Input: {manifest.input}. Output: {manifest.output} `[N, {len(manifest.classes)}]`"
    if manifest.output == "logits":
        scaled = "" if manifest.temperature == 1 else f" / {manifest.temperature:.6g}"
        give += f"; softmax(logits{scaled}) are the probabilities"
    mode = "RGB" if channels == 3 else "L"
    opened = f'ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")'
    given = [
        f"image = np.array({opened})",
        f"images = image.reshape(1, *image.shape[:2], {channels})",
    ]
    if manifest.raw:
        given = [
            f'images = np.zeros((1, {channels}, {side}, {side}), dtype="float32")  # as said above'
        ]
    code = {
        "onnx": [
            "import numpy as np",
            "import onnxruntime",
            "from PIL import Image, ImageOps",
            "",
            f'model = onnxruntime.InferenceSession("{file}")',
            *given,
            'outputs = model.run(None, {"images": images})[0]',
        ],
        "torch": [
            "import numpy as np",
            "import torch",
            "from PIL import Image, ImageOps",
            "",
            f'model = torch.export.load("{file}").module()',
            *given,
            "outputs = model(torch.from_numpy(images))",
        ],
        "timm": [
            "import timm",
            "from PIL import Image, ImageOps",
            "",
            'model = timm.create_model("local-dir:.", pretrained=True).eval()',
            "config = timm.data.resolve_model_data_config(model)",
            "transform = timm.data.create_transform(**config, is_training=False)",
            f"outputs = model(transform({opened})[None])",
        ],
    }[manifest.kind]
    block = "\n".join(["```python", *code, "```"])
    return f"{give}.\n\n{block}\n\n`nearkin export --verify .` checks the files of this folder."
