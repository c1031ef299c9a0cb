"""Augmentations of whole images: torchvision's RandAugment, ColorJitter, RandomGrayscale and RandomErasing.

The random numbers are those of torchvision 0.25, drawn from one generator for each image. The pixels are equal too, but
a shifted hue may round to the next grey level. Faster than torchvision's modules on small images: no
dispatch, moves by a table of indices, the hue without a conversion to HSV.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nearkin.data.transforms import Drawing, Drawn, log_ratios

BINS = 31  # magnitudes 0 to 30
FULL = 255.999  # torchvision's factor from [0, 1] to uint8
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
# Of RandAugment, in the order that a number is drawn for: whether a sign is drawn, and the magnitudes 0 and 30
# (a share of the side for translations). Source: Cubuk et al. 2019, as in torchvision.
OPERATIONS: dict[str, tuple[bool, float, float]] = {
    "identity": (False, 0.0, 0.0),
    "shear x": (True, 0.0, 0.3),
    "shear y": (True, 0.0, 0.3),
    "translate x": (True, 0.0, 150 / 331),
    "translate y": (True, 0.0, 150 / 331),
    "rotate": (True, 0.0, 30.0),
    "brightness": (True, 0.0, 0.9),
    "saturation": (True, 0.0, 0.9),
    "contrast": (True, 0.0, 0.9),
    "sharpness": (True, 0.0, 0.9),
    "posterize": (False, 8.0, 4.0),
    "solarize": (False, 1.0, 0.0),
    "autocontrast": (False, 0.0, 0.0),
    "equalize": (False, 0.0, 0.0),
}
NAMES = tuple(OPERATIONS)
COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda image, _: image,
    "brightness": lambda image, value: F.adjust_brightness_image(image, 1 + value),
    "saturation": lambda image, value: F.adjust_saturation_image(image, 1 + value),
    "contrast": lambda image, value: F.adjust_contrast_image(image, 1 + value),
    "sharpness": lambda image, value: F.adjust_sharpness_image(image, 1 + value),
    "posterize": lambda image, value: F.posterize_image(image, round(value)),
    "solarize": lambda image, value: F.solarize_image(image, 255 * value),
    "autocontrast": lambda image, _: F.autocontrast_image(image),
    "equalize": lambda image, _: F.equalize_image(image),
}


@dataclass(frozen=True)
class RandAugment(Drawing):
    """Two operations of `OPERATIONS` with one magnitude, 0 to 30. Uncovered pixels are black."""

    magnitude: int
    count: int = 2

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Drawn:  # noqa: ARG002
        drawn: list[int] = []
        for _place in range(self.count):
            number = int(torch.randint(len(NAMES), (), generator=generator))
            signed = OPERATIONS[NAMES[number]][0]
            negative = signed and torch.rand((), generator=generator).item() <= 0.5
            drawn += (number, -1 if negative else 1)
        return tuple(drawn)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        for number, sign in zip(drawn[::2], drawn[1::2], strict=True):
            name = NAMES[number]
            if name in COLOURS:
                image = COLOURS[name](image, sign * _magnitude(name, self.magnitude))
            else:
                image = _moved(image, name, self.magnitude, sign)
        return image


@cache
def _magnitude(name: str, place: int, side: int = 1) -> float:
    """In float32, as torchvision has it."""
    _, least, most = OPERATIONS[name]
    return float(torch.linspace(least * side, most * side, BINS)[place])


def _moved(image: Tensor, name: str, place: int, sign: int) -> Tensor:
    """The pixels of `image` at `_sources`; black where there is none."""
    height, width = image.shape[-2:]
    sources = _sources(name, place, sign, height, width)
    black = image.new_zeros((len(image), 1))
    return torch.cat([black, image.flatten(1)], 1).index_select(1, sources).view_as(image)


@lru_cache(maxsize=64)  # two signs of five moves and a few sizes
def _sources(name: str, place: int, sign: int, height: int, width: int) -> Tensor:
    """`[H W]`: 1 + the number of the pixel that moves to each place, 0 for none. It is torchvision's nearest pixel: an
    image of the numbers is moved by torchvision."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    side = {"translate x": width, "translate y": height}.get(name, 1)
    value = sign * _magnitude(name, place, side)
    shear = math.degrees(math.atan(value))
    moves: dict[str, Callable[[], Tensor]] = {
        "shear x": lambda: F.affine_image(numbers, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0]),
        "shear y": lambda: F.affine_image(numbers, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0]),
        "translate x": lambda: F.affine_image(numbers, 0.0, [int(value), 0], 1.0, [0.0, 0.0]),
        "translate y": lambda: F.affine_image(numbers, 0.0, [0, int(value)], 1.0, [0.0, 0.0]),
        "rotate": lambda: F.rotate_image(numbers, value),
    }
    return moves[name]().flatten().to(torch.int32)


@dataclass(frozen=True)
class Jitter(Drawing):
    """Brightness, contrast and saturation times a factor in 1 +- `strength`, hue plus up to `hue` turns, in a random
    order; of grey images brightness and contrast only. prob: share of the images."""

    strength: float
    hue: float
    grey: bool
    prob: float = 1.0

    def draw(self, _: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        if self.prob < 1 and torch.rand(1, generator=generator).item() >= self.prob:
            return ()
        order = torch.randperm(4, generator=generator).tolist()
        factors = [(max(0.0, 1 - self.strength), 1 + self.strength)] * (2 if self.grey else 3)
        ranges = factors if self.grey else [*factors, (-self.hue, self.hue)]
        number = torch.empty(())
        values = [number.uniform_(*ends, generator=generator).item() for ends in ranges]
        return tuple((part, values[part]) for part in order if part < len(values))

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        for part, value in drawn:
            image = JITTERS[part](image, value)
        return image


def shift_hue(image: Tensor, turns: float) -> Tensor:
    """Hue plus `turns` of an image uint8 `[3, H, W]`; HSV's value and saturation stay.

    With M and m the largest and the least channel and h the hue in sixths of a turn, channel n = 5, 3, 1 (red, green,
    blue) becomes M - (M - m) min(1, max(0, min(k, 4 - k))), k = (n + h + 6 turns) mod 6. Source: A. Smith 1978, in the
    form without cases.
    """
    pixels = image.to(torch.float32).div_(255)
    low, high = torch.aminmax(pixels, dim=0)
    chroma = high - low
    red, green, blue = (high - pixels).div_(chroma.clamp(min=1e-3))  # chroma is 0 or 1/255 and more
    hue = torch.where(high == pixels[0], blue - green, 4 + green - red)
    hue = torch.where((high == pixels[1]) & (high != pixels[0]), 2 + red - blue, hue)
    places = torch.stack([hue + (n + 6 * turns) for n in (5, 3, 1)]).remainder_(6)
    share = torch.minimum(places, 4 - places).clamp_(0, 1)
    return (high - chroma * share).mul_(FULL).to(torch.uint8)


JITTERS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    F.adjust_brightness_image,
    F.adjust_contrast_image,
    F.adjust_saturation_image,
    shift_hue,
)


@dataclass(frozen=True)
class RandomGrey(Drawing):
    """Grey in a share `prob` of the images."""

    prob: float

    def draw(self, _: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        return (torch.rand(1, generator=generator).item() < self.prob,)

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        return F.rgb_to_grayscale_image(image, num_output_channels=3) if drawn[0] else image


@dataclass(frozen=True)
class RandomErasing(Drawing):
    """A black rectangle in a share `prob` of the images. Source: Zhong et al. 2020."""

    prob: float

    def draw(self, shape: torch.Size, generator: torch.Generator | None = None) -> Drawn:
        if torch.rand(1, generator=generator).item() >= self.prob:
            return ()
        height, width = shape[-2:]
        number = torch.empty(())
        for _ in range(10):
            area = height * width * number.uniform_(*ERASED_AREA, generator=generator).item()
            ratio = number.uniform_(*log_ratios(ERASED_RATIO), generator=generator).exp_().item()
            high_, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if high_ < height and wide < width:
                top = torch.randint(height - high_ + 1, (1,), generator=generator).item()
                left = torch.randint(width - wide + 1, (1,), generator=generator).item()
                return top, left, high_, wide
        return ()

    def apply(self, image: Tensor, drawn: Drawn) -> Tensor:
        if not drawn:
            return image
        top, left, height, width = drawn
        image = image.clone()
        image[:, top : top + height, left : left + width] = 0
        return image
