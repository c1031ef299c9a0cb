"""Test-time augmentation: the views of an image whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nearkin.data.transforms import EvalSpec, ResizeShortSide, Transform, eval_transform
from nearkin.evaluation.options import Tta, check_choice

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
        return Single(eval_transform(spec), mirrored=name == "flip")
    size = spec.image_size
    resize = spec.resize if spec.resize > size else round(size * 256 / 224)
    return TenCrop(ResizeShortSide(max(resize, size + 2), spec.interpolation, spec.antialias), size)


@dataclass(frozen=True)
class Single:
    """The transformed image, and its mirror image if `mirrored`."""

    transform: Transform
    mirrored: bool

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        view = self.transform(image)
        return (view, view.flip(-1)) if self.mirrored else (view,)


@dataclass(frozen=True)
class TenCrop:
    """Four corners and the centre of the resized image, then those of its mirror image."""

    resize: Transform
    size: int

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        resized = self.resize(image)
        return (*self._five(resized), *self._five(resized.flip(-1)))

    def _five(self, image: Tensor) -> tuple[Tensor, ...]:
        down, right = (side - self.size for side in image.shape[-2:])
        corners = ((0, 0), (0, right), (down, 0), (down, right))
        places = (*corners, (round(down / 2), round(right / 2)))
        return tuple(image[..., y : y + self.size, x : x + self.size] for y, x in places)
