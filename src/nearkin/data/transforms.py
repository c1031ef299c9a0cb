"""Augmentation and evaluation transforms: uint8 in, uint8 out, no normalisation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from nearkin.imports import import_eager

Transform = Callable[[Tensor], Tensor]
Interpolation = Literal["bilinear", "bicubic"]
Drawn = tuple[Any, ...]  # what a step draws for an image

LONGEST = 8  # times the short side; longer images are cut: a resized strip could fill the memory
RATIOS = (3 / 4, 4 / 3)  # of width to height of a random region


@dataclass(frozen=True)
class Pipeline:
    """Steps, applied in order."""

    steps: tuple[Transform, ...]

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image

    def of_each(self, images: Sequence[Tensor], seeds: Iterable[int]) -> Iterator[Tensor]:
        """For each image the result of `self(image)` after `torch.manual_seed(seed)`; no global state is touched."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = iter(images)
        for step in self.steps:
            made = step.of_each(made, generators) if isinstance(step, Drawing) else map(step, made)
        return made


class Drawing(ABC):
    """A step that draws a few numbers for an image and then treats it."""

    def __call__(self, image: Tensor) -> Tensor:
        image = self.prepare(image)
        return self.apply(image, self.draw(image.shape))

    def of_each(
        self, images: Iterable[Tensor], generators: Sequence[torch.Generator]
    ) -> Iterator[Tensor]:
        """Draws the random numbers of all images first: between the pixel operations of two images a draw takes up to
        three times as long. The images are then transformed lazily, one at a time through all steps."""
        images = [self.prepare(image) for image in images]
        pairs = zip(images, generators, strict=True)
        draws = [self.draw(image.shape, generator) for image, generator in pairs]
        return map(self.apply, images, draws)

    def prepare(self, images: Tensor) -> Tensor:
        """The part of the work that needs no draw."""
        return images

    @abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        """For one image, from its own generator or the global one."""

    @abstractmethod
    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        """`[C, H, W]` and what was drawn for it."""


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
        functional = import_eager("torchvision.transforms.v2.functional")
        mode = functional.InterpolationMode(self.interpolation)
        resized: Tensor = functional.resize(image, [self.side], mode, antialias=self.antialias)
        return resized


@dataclass(frozen=True)
class CentreCrop:
    """The centre `side` x `side` of an image that is at least as large."""

    side: int

    def __call__(self, image: Tensor) -> Tensor:
        return _centre(image, self.side, self.side)


@dataclass(frozen=True)
class RandomPaddedCrop(Drawing):
    """Short side to `side`, `padding` black pixels on each edge, a random `side` x `side`."""

    side: int
    padding: int

    def prepare(self, images: Tensor) -> Tensor:
        resized = ResizeShortSide(self.side)(images)
        return torch.nn.functional.pad(resized, [self.padding] * 4)

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        down, right = shape[-2] - self.side + 1, shape[-1] - self.side + 1
        top = torch.randint(down, (), generator=generator).item()
        return int(top), int(torch.randint(right, (), generator=generator).item())

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        top, left = drawn
        return image[:, top : top + self.side, left : left + self.side]


@dataclass(frozen=True)
class RandomRegion(Drawing):
    """torchvision's RandomResizedCrop, bilinear and antialiased: the same draws and the same bits. It takes about half
    the time, since the region is copied in channels_last before it is resized."""

    side: int
    scale: tuple[float, float]

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        height, width = shape[-2:]
        number = torch.empty(())  # float32 holds all whole numbers that are drawn
        for _ in range(10):
            area = height * width * number.uniform_(*self.scale, generator=generator).item()
            ratio = number.uniform_(*log_ratios(RATIOS), generator=generator).exp_().item()
            high, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < high <= height and 0 < wide <= width:
                top = number.random_(height - high + 1, generator=generator).item()
                left = number.random_(width - wide + 1, generator=generator).item()
                return int(top), int(left), high, wide
        # The largest centre whose ratio is allowed.
        high, wide = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
        return (height - high) // 2, (width - wide) // 2, high, wide

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        top, left, high, wide = drawn
        colours, down, right = image.stride()
        # One call instead of two slices, which are slow while the caches hold pixels.
        start = image.storage_offset() + top * down + left * right
        shape = (1, len(image), high, wide)
        region = image.as_strided(shape, (high * down, colours, down, right), start)
        region = region.contiguous(memory_format=torch.channels_last)
        sides = (self.side, self.side)
        return torch.nn.functional.interpolate(region, sides, mode="bilinear", antialias=True)[0]


@dataclass(frozen=True)
class RandomFlip(Drawing):
    """The mirror image in half of the cases."""

    def draw(self, _: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        return (int(torch.rand((), generator=generator).item() < 0.5),)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        return image.flip(-1) if drawn[0] else image


@cache
def log_ratios(ratios: tuple[float, float]) -> tuple[float, float]:
    """In float32, as torchvision has them."""
    low, high = torch.tensor(ratios).log().tolist()
    return low, high


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    """As torchvision centres: half a pixel is rounded to the even side."""
    top, left = round((image.shape[-2] - height) / 2), round((image.shape[-1] - width) / 2)
    return image[..., top : top + height, left : left + width]


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
        pixels and above that from 35 % of the area."""
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


def eval_transform(spec: EvalSpec) -> Pipeline:
    """uint8 `[C, H, W]` of any size -> uint8 `[C, image_size, image_size]`, the same every time."""
    resize = ResizeShortSide(spec.resize, spec.interpolation, spec.antialias)
    return Pipeline((resize, CentreCrop(spec.image_size)))


def train_transform(spec: TrainSpec) -> Pipeline:
    """uint8 `[channels, H, W]` of any size -> uint8 `[channels, image_size, image_size]`, drawn from torch's RNG.

    In this order: crop, mirror image, RandAugment, colour jitter, grey, erasing. mixup and CutMix are no part of it:
    see `mix`.
    """
    return Pipeline(tuple(_train_steps(spec)))


def _train_steps(spec: TrainSpec) -> Iterator[Transform]:
    size, scale, grey = spec.image_size, spec.crop_scale, spec.channels == 1
    if scale == "centre":
        yield from (ResizeShortSide(size), CentreCrop(size))
    elif scale == "padded":
        yield RandomPaddedCrop(size, max(1, size // 8))
    else:
        yield RandomRegion(size, (scale, 1.0))
    if spec.flip:
        yield RandomFlip()
    if not (spec.randaugment or spec.jitter or spec.grey_prob or spec.erasing):
        return  # torchvision takes a while to load
    from nearkin.data import colour

    if spec.randaugment:
        yield colour.RandAugment(spec.randaugment)
    if spec.jitter and spec.jitter_prob:
        yield colour.Jitter(spec.jitter, spec.jitter / 4, grey, spec.jitter_prob)
    if spec.grey_prob and not grey:
        yield colour.RandomGrey(spec.grey_prob)
    if spec.erasing:
        yield colour.RandomErasing(spec.erasing)
