"""Test-time augmentation: the views of an image whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from nearkin.data.transforms import EvalSpec, ResizeShortSide, Transform, eval_transform
from nearkin.evaluation.options import Tta, check_choice
from nearkin.imports import import_eager

COUNTS: dict[Tta, int] = {"none": 1, "flip": 2, "tencrop": 10}


def tta_views(name: Tta, spec: EvalSpec) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """uint8 `[C, H, W]` -> V views `[C, image_size, image_size]` of one decoded and once resized image.

    none: the evaluation transform. flip: that and its mirror image. tencrop: the four corners and the centre of the
    resized image, and their mirror images; where the evaluation keeps the whole short side, it is enlarged to
    round(image_size * 256 / 224) first, so that the corners differ.

    Raises ConfigError for another name.
    """
    check_choice("tta", name, Tta)
    if name != "tencrop":
        return partial(_single, transform=eval_transform(spec), mirrored=name == "flip")
    size = spec.image_size
    resize = max(spec.resize if spec.resize > size else round(size * 256 / 224), size + 2)
    enlarge = ResizeShortSide(resize, spec.interpolation, spec.antialias)
    return partial(_ten_crop, resize=enlarge, size=size)


def _single(image: Tensor, transform: Transform, mirrored: bool) -> tuple[Tensor, ...]:
    view = transform(image)
    return (view, view.flip(-1)) if mirrored else (view,)


def _ten_crop(image: Tensor, resize: Transform, size: int) -> tuple[Tensor, ...]:
    functional = import_eager("torchvision.transforms.v2.functional")
    return tuple(functional.ten_crop(resize(image), [size, size]))
