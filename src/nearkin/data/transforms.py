"""What happens to the pixels between the file and the network: uint8 in, uint8 out, no normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Transform = Callable[[Tensor], Tensor]
Strength = Literal["none", "light", "medium", "strong"]
Interpolation = Literal["bilinear", "bicubic"]

SMALL = 64  # up to this side images are used whole; above it they are cropped
LONGEST = 8  # times the short side: what lies beyond is cut, a resized strip would fill the memory


class EvalSpec(BaseModel):
    """The evaluation transform, in numbers that travel with a model.

    The short side becomes `resize` pixels, then the centre `image_size` x `image_size` is cut out.
    channels: that the images must have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(ge=1)
    resize: int = Field(ge=1)
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    channels: int = Field(ge=1)

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.resize < self.image_size:
            raise ValueError(f"resize {self.resize} is smaller than image_size {self.image_size}")
        return self

    @classmethod
    def for_size(cls, image_size: int, channels: int) -> Self:
        """resize: `image_size` up to 64 pixels, above that round(image_size * 256 / 224), as is usual."""
        resize = image_size if image_size <= SMALL else round(image_size * 256 / 224)
        return cls(image_size=image_size, resize=resize, channels=channels)


def eval_transform(spec: EvalSpec) -> Transform:
    """uint8 `[C, H, W]` of any size -> uint8 `[C, image_size, image_size]`, the same every time."""
    return Pipeline(
        (
            ResizeShortSide(spec.resize, spec.interpolation, spec.antialias),
            CentreCrop(spec.image_size),
        )
    )


def train_transform(strength: Strength, *, image_size: int, channels: int, flip: bool) -> Transform:
    """uint8 `[channels, H, W]` of any size -> uint8 `[channels, image_size, image_size]`, drawn from torch's RNG.

    none:   short side to image_size, centre crop.
    light:  up to 64 pixels a random crop after padding by 1/8 of the side, at least 1 pixel; above, a
            random region of 35 to 100 % of the area, resized. Then a mirror image in half of the cases,
            if `flip`.
    medium: light, then colour jitter (brightness .4, contrast .4, saturation .4, hue .1; of grey images
            only the first two) and, for colour, grey in a tenth of the cases.
    strong: light, then RandAugment (2 operations of magnitude 9), the jitter, and in a quarter of the
            cases a black rectangle. mixup and CutMix are no part of it: see `mix`.

    Source: our choice.
    """
    if strength == "none":
        return Pipeline((ResizeShortSide(image_size), CentreCrop(image_size)))
    light: list[Transform] = [_random_crop(image_size)]
    if flip:
        light.append(RandomFlip())
    return Pipeline((*light, *_colour(strength, channels)))


def _random_crop(image_size: int) -> Transform:
    if image_size <= SMALL:
        return RandomPaddedCrop(image_size, max(1, image_size // 8))
    from torchvision.transforms import v2

    crop: Transform = v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True)
    return crop


def _colour(strength: Strength, channels: int) -> Sequence[Transform]:
    if strength == "light":
        return ()
    from torchvision.transforms import v2

    grey = channels == 1
    jitter = v2.ColorJitter(0.4, 0.4) if grey else v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    if strength == "medium":
        return (jitter,) if grey else (jitter, v2.RandomGrayscale(0.1))
    return v2.RandAugment(2, 9), jitter, v2.RandomErasing(0.25)


@dataclass(frozen=True)
class Pipeline:
    """One step after the other."""

    steps: tuple[Transform, ...]

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


@dataclass(frozen=True)
class ResizeShortSide:
    """The short side becomes `side` pixels; the ratio of the sides stays, up to 8 to 1."""

    side: int
    interpolation: Interpolation = "bilinear"
    antialias: bool = True

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        short = min(height, width)
        if max(height, width) > LONGEST * short:
            image = _centre(image, min(height, LONGEST * short), min(width, LONGEST * short))
        if short == self.side:
            return image
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        mode = InterpolationMode(self.interpolation)
        resized: Tensor = functional.resize(image, [self.side], mode, antialias=self.antialias)
        return resized


@dataclass(frozen=True)
class CentreCrop:
    """The centre `side` x `side` of an image that is at least as large."""

    side: int

    def __call__(self, image: Tensor) -> Tensor:
        return _centre(image, self.side, self.side)


@dataclass(frozen=True)
class RandomPaddedCrop:
    """Short side to `side`, `padding` black pixels on each edge, a random `side` x `side`."""

    side: int
    padding: int

    def __call__(self, image: Tensor) -> Tensor:
        image = ResizeShortSide(self.side)(image)
        image = torch.nn.functional.pad(image, [self.padding] * 4)
        top, left = (int(torch.randint(n - self.side + 1, ())) for n in image.shape[-2:])
        return image[..., top : top + self.side, left : left + self.side]


@dataclass(frozen=True)
class RandomFlip:
    """The mirror image in half of the cases."""

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(-1) if torch.rand(()) < 0.5 else image


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    """As torchvision centres: half a pixel is rounded to the even side."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]
