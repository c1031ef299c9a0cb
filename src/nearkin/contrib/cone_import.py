"""Imports a checkpoint of the CoNe authors as a nearkin model with the same logits. No code of it is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nearkin.config import RunConfig
from nearkin.data.transforms import EvalSpec
from nearkin.errors import ConfigError, ModelError, printable
from nearkin.evaluation.model import FORMAT, Description, ModelSpec, build
from nearkin.network import read_tensors
from nearkin.objectives.cone import CoNe

STUDENT = "encoder_q."
IGNORED = ("encoder_k.", "queue")  # the teacher and the bank, which inference does not need
PREFIXES = {  # in the checkpoint -> in nearkin
    "net.": "backbone.",
    "head.head.": "heads.projection.",
    "fc.": "heads.classifier.",
}
BIAS, MEAN = "heads.projection.0.bias", "heads.projection.1.running_mean"
COUNTER = ".num_batches_tracked"
# torchvision's ResNets: blocks of the four stages, whether a block has three convolutions -> name in timm.
DEPTHS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
PUBLISHED = {
    "classifier": "embedding",
    "neighbour_weight": 0.7,
    "consistency_weight": 0.4,
    "teacher_crop": "same",
}
NO_BANK = {"bank": 1, "topk": 1, "warmup_steps": 0}  # inference needs none: one slot costs nothing
LARGEST_LIST = 16 << 20


class Imported(NamedTuple):
    """A model ready to be saved: its description, its weights by nearkin's names, and its config.yaml."""

    description: Description
    weights: dict[str, Tensor]
    config: RunConfig


def read_cone_checkpoint(file: Path, classes: tuple[str, ...] | None = None) -> Imported:
    """The student of a checkpoint that the published CoNe code wrote: ResNet, projection head and classifier.

    file: `.pth`, `.pt`, `.bin` or `.safetensors` with entries `[module.]encoder_q.net.*` (torchvision's names),
    `.head.head.{0,1,3}.*` and `.fc.*`; depth, widths and the number of classes C follow from the tensors.
    The published head has a bias b in front of BatchNorm, nearkin's has none; running_mean - b in place of
    running_mean gives the same output in eval mode.
    classes: C names in the order of the classifier's rows; by default "000", "001", ..., of equal length.

    Raises ModelError when the file is no such checkpoint, when an entry is missing, unexpected, of another shape or not
    finite, or when the number of `classes` is not C.
    Source: published code; methods page of cone.
    """
    given = _student(read_tensors(file), file)
    model = _resnet(given, file)
    hidden, _ = _matrix(given, "heads.projection.0.weight", file)
    count, embedding = _matrix(given, "heads.classifier.weight", file)
    sizes = {"hidden": hidden, "embedding": embedding}
    spec = ModelSpec(
        model=model,
        channels=3,
        image_size=224,
        stem="default",
        objective=CoNe.name,
        options=PUBLISHED | NO_BANK | sizes,
        classes=_names(classes, count, file),
    )
    built = build(spec)
    own = built.network.state_dict()
    _check(given, own, f"{printable(str(file))} is no CoNe checkpoint of a {model}")
    weights = _weights(given, own, file)
    description = Description(
        format=FORMAT,
        nearkin=version("nearkin"),
        spec=built.spec,
        transform=EvalSpec(image_size=224, resize=256, channels=3),
        heads=tuple(built.network.active),
        imported=True,
    )
    shared = spec.model_dump(include={"objective", "model", "image_size", "channels", "stem"})
    options = CoNe.Config.model_validate(PUBLISHED | sizes).model_dump(mode="json")
    config = RunConfig(data="imagenet", epochs=0, options=options, **shared)
    return Imported(description, weights, config)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Class names in the order of their numbers: one a line, or a list of strings in a `.json` file.

    Raises ConfigError when the file cannot be read or is no such list, or a name is empty or repeated.
    """
    shown = printable(str(file))
    try:
        if file.stat().st_size > LARGEST_LIST:
            raise ConfigError(f"{shown} is larger than 16 MiB; --classes takes one name a line.")
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.suffix == ".json" else text.removesuffix("\n").split("\n")
    except OSError as error:
        raise ConfigError(f"Cannot read the class names {shown}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        wanted = "JSON list" if file.suffix == ".json" else "UTF-8 text"
        raise ConfigError(f"The class names {shown} are no {wanted}.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"The class names {shown} are no list of strings; write one, in order.")
    seen: dict[str, int] = {}
    for number, name in enumerate(map(str.strip, names), 1):
        if not name:
            problem = f"an empty name at position {number}; write one name a line"
            raise ConfigError(f"{shown} has {problem}.")
        if name in seen:
            problem = f"the class {printable(name)} at positions {seen[name]} and {number}"
            raise ConfigError(f"{shown} has {problem}.")
        seen[name] = number
    return tuple(seen)


def _student(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The student's tensors by nearkin's names; all others must belong to the teacher or the bank."""
    shown = printable(str(file))
    if not any(name.startswith(STUDENT) for name in tensors):
        first = printable(next(iter(tensors)))[:80]
        raise ModelError(
            f"{shown} is no CoNe checkpoint: it holds {first}, ..., but no entry encoder_q.*; "
            "other weights go into train --weights."
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(IGNORED):
            continue
        inner = name.removeprefix(STUDENT)
        prefix = next((prefix for prefix in PREFIXES if inner.startswith(prefix)), None)
        if inner == name or prefix is None:
            raise ModelError(
                f"{shown} is no CoNe checkpoint: it has the unexpected entry {printable(name)[:80]}."
            )
        found[PREFIXES[prefix] + inner.removeprefix(prefix)] = tensor
    return found


def _resnet(given: Mapping[str, Tensor], file: Path) -> str:
    """timm's name of the ResNet with these blocks."""
    numbers = [re.match(r"backbone\.layer([1-4])\.([0-9]{1,3})\.", name) for name in given]
    blocks = {(int(m[1]), int(m[2])) for m in numbers if m}
    counts = tuple(sum(layer == stage for layer, _ in blocks) for stage in (1, 2, 3, 4))
    three = "backbone.layer1.0.conv3.weight" in given
    model = DEPTHS.get((counts, three))
    if model is None:
        raise ModelError(
            f"{printable(str(file))} holds no ResNet-18, 34, 50, 101 or 152 under encoder_q.net: its stages "
            f"have {', '.join(map(str, counts))} blocks."
        )
    return model


def _matrix(given: Mapping[str, Tensor], name: str, file: Path) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    shape = given[name].shape if name in given else ()
    if len(shape) != 2 or min(shape) < 1:
        what = f"has the shape {_shape(given[name])}" if name in given else "is missing"
        raise ModelError(
            f"{printable(str(file))} is no CoNe checkpoint: {_published_name(name)} {what}."
        )
    return shape[0], shape[1]


def _names(classes: tuple[str, ...] | None, count: int, file: Path) -> tuple[str, ...]:
    if classes is None:
        return tuple(f"{number:0{len(str(count - 1))}d}" for number in range(count))
    if len(classes) != count:
        raise ModelError(
            f"--classes gives {len(classes)} names, but {printable(str(file))} has {count} classes; "
            "give one name for each, in the order of the classifier."
        )
    return classes


def _check(given: Mapping[str, Tensor], own: Mapping[str, Tensor], problem: str) -> None:
    """Raises ModelError unless `given` holds exactly the tensors of the network, with the same shapes and types."""
    wanted = {name: own[name] for name in own if name.startswith(tuple(PREFIXES.values()))}
    wanted[BIAS] = own[MEAN]
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTER)]
    if missing:
        raise ModelError(f"{problem}: {_published_name(missing[0])} is missing.")
    for name, tensor in given.items():
        if name not in wanted:
            what = "is unexpected"
        elif tensor.shape != wanted[name].shape:
            what = f"has the shape {_shape(tensor)} instead of {_shape(wanted[name])}"
        elif tensor.is_floating_point() != wanted[name].is_floating_point():
            what = f"has the type {tensor.dtype}"
        else:
            continue
        raise ModelError(f"{problem}: {_published_name(name)} {what}.")


def _weights(given: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The state dict of the network, with the head's bias in the running mean. Raises ModelError for bad values."""
    given[MEAN] = given[MEAN].double() - given.pop(BIAS).double()
    weights = own | {name: tensor.to(own[name].dtype) for name, tensor in given.items()}
    for name, tensor in weights.items():
        negative = name.endswith("running_var") and bool((tensor < 0).any())
        if negative or not bool(tensor.isfinite().all()):
            what = "a negative variance" if negative else "values that are not finite, first"
            shown = printable(str(file))
            raise ModelError(f"{shown} holds {what} in {_published_name(name)}.")
    return weights


def _published_name(name: str) -> str:
    """The name of a tensor in the checkpoint, for messages."""
    published, own = next((pair for pair in PREFIXES.items() if name.startswith(pair[1])), ("", ""))
    return STUDENT + printable(published + name.removeprefix(own))[:80]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a scalar"
