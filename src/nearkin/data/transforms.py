"""What happens to the pixels between the file and the network: uint8 in, uint8 out, no normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nearkin.data.steps import (
    CentreCrop,
    Interpolation,
    Pipeline,
    RandomFlip,
    RandomPaddedCrop,
    RandomRegion,
    ResizeShortSide,
    Transform,
)

Strength = Literal["none", "light", "medium", "strong"]

SMALL = 64  # up to this side images are used whole; above it they are cropped


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
    def for_size(cls, image_size: int, channels: int, crop: float = 1.0) -> Self:
        """crop: the share of the short side that the centre keeps, in (0, 1]; resize = round(image_size / crop)."""
        return cls(image_size=image_size, resize=round(image_size / crop), channels=channels)


class TrainSpec(BaseModel):
    """The training transform. Its numbers have the names of the options, so that a resolved RunConfig gives them.

    crop_scale: least share of the area that a random region has, in (0, 1]; `padded`: a random crop after padding by
    1/8 of the side, at least 1 pixel; `centre`: no randomness. flip: a mirror image in half of the cases.
    randaugment: magnitude of 2 operations, 0 to 30. jitter: brightness, contrast, saturation; hue a quarter of it; of
    grey images only the first two; in a share `jitter_prob` of the cases. grey_prob: share that becomes grey.
    erasing: share that gets a black rectangle. 0 leaves a part out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    flip: bool = False
    crop_scale: float | Literal["padded", "centre"] = "centre"
    randaugment: int = 0
    jitter: float = 0.0
    jitter_prob: float = 1.0
    grey_prob: float = 0.0
    erasing: float = 0.0

    @classmethod
    def of(cls, strength: Strength, *, image_size: int, channels: int, flip: bool = False) -> Self:
        """A named strength: see `STRENGTHS`. `none` crops the centre; the others crop at random, `padded` up to 64
        pixels and above that from 35 % of the area. Source: our choice."""
        random = "padded" if image_size <= SMALL else 0.35
        crop: Any = "centre" if strength == "none" else random
        parts: Any = STRENGTHS[strength]
        return cls(image_size=image_size, channels=channels, flip=flip, crop_scale=crop, **parts)


STRENGTHS: dict[Strength, dict[str, float]] = {
    "none": {},
    "light": {},
    "medium": {"jitter": 0.4, "grey_prob": 0.1},
    "strong": {"randaugment": 9, "jitter": 0.4, "erasing": 0.25},
}


def eval_transform(spec: EvalSpec) -> Transform:
    """uint8 `[C, H, W]` of any size -> uint8 `[C, image_size, image_size]`, the same every time."""
    return Pipeline(
        (
            ResizeShortSide(spec.resize, spec.interpolation, spec.antialias),
            CentreCrop(spec.image_size),
        )
    )


def train_transform(spec: TrainSpec) -> Transform:
    """uint8 `[channels, H, W]` of any size -> uint8 `[channels, image_size, image_size]`, drawn from torch's RNG.

    In this order: crop, mirror image, RandAugment, colour jitter, grey, erasing. mixup and CutMix are no part of it:
    see `mix`.
    """
    flip = (RandomFlip(),) if spec.flip else ()
    return Pipeline((*_crop(spec), *flip, *_colour(spec)))


def _crop(spec: TrainSpec) -> tuple[Transform, ...]:
    size, scale = spec.image_size, spec.crop_scale
    if scale == "centre":
        return ResizeShortSide(size), CentreCrop(size)
    if scale == "padded":
        return (RandomPaddedCrop(size, max(1, size // 8)),)
    return (RandomRegion(size, (scale, 1.0)),)


def _colour(spec: TrainSpec) -> Iterator[Transform]:
    if not (spec.randaugment or spec.jitter or spec.grey_prob or spec.erasing):
        return  # torchvision takes a while to load
    from torchvision.transforms import v2

    x, grey = spec.jitter, spec.channels == 1
    if spec.randaugment:
        yield v2.RandAugment(2, spec.randaugment)
    if x and spec.jitter_prob:
        jitter = v2.ColorJitter(x, x) if grey else v2.ColorJitter(x, x, x, x / 4)
        yield jitter if spec.jitter_prob == 1 else v2.RandomApply([jitter], spec.jitter_prob)
    if spec.grey_prob and not grey:
        yield v2.RandomGrayscale(spec.grey_prob)
    if spec.erasing:
        yield v2.RandomErasing(spec.erasing)
