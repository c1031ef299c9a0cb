"""The preprocessing inside an exported model gives the pixels of the evaluation transform, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.errors import ExportError
from nearkin.export.module import Preprocess


def noise(channels, high, wide, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, high, wide), generator=generator, dtype=torch.uint8)


def prepared(image, **spec):
    channels = len(image)
    module = Preprocess(EvalSpec(channels=channels, **spec))
    return module(image.permute(1, 2, 0)[None])[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("high", "wide"),
    [
        (8, 8),  # as it is
        (5, 3),  # enlarged
        (1, 1),
        (97, 64),
        (300, 131),
        (131, 300),
        (64, 513),  # just longer than 8 to 1
        (700, 7),
        (3, 100),
    ],
)
@pytest.mark.parametrize(("size", "resize"), [(8, 8), (56, 64), (33, 40), (24, 24)])
def test_the_pixels_are_those_of_evaluation(channels, high, wide, size, resize):
    image = noise(channels, high, wide)
    spec = EvalSpec(image_size=size, resize=resize, channels=channels)
    expected = eval_transform(spec)(image).float()
    assert torch.equal(prepared(image, image_size=size, resize=resize), expected)


def test_large_photos_differ_in_a_few_pixels_by_one_level():
    """Their sums have more bits than float32 keeps."""
    image = noise(3, 2000, 3001)
    spec = EvalSpec(image_size=224, resize=224, channels=3)
    difference = (prepared(image, image_size=224, resize=224) - eval_transform(spec)(image)).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-4


def test_the_pixels_are_those_of_pillow_up_to_rounding():
    """Pillow has more bits in its weights."""
    image = noise(3, 150, 211)
    given = prepared(image, image_size=48, resize=60)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = picture.resize((60 * 211 // 150, 60), Image.Resampling.BILINEAR)
    left, top = (resized.width - 48) // 2, (resized.height - 48) // 2
    expected = np.asarray(resized.crop((left, top, left + 48, top + 48)))
    difference = np.abs(given.permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05


def test_a_batch_is_its_images():
    images = torch.stack([noise(3, 40, 50, seed) for seed in range(3)])
    module = Preprocess(EvalSpec(image_size=16, resize=18, channels=3))
    rows = images.permute(0, 2, 3, 1)
    singles = torch.cat([module(row[None]) for row in rows])
    assert torch.equal(module(rows), singles)


@pytest.mark.parametrize("changed", [{"interpolation": "bicubic"}, {"antialias": False}])
def test_another_interpolation_is_refused(changed):
    with pytest.raises(ExportError, match="use --raw"):
        Preprocess(EvalSpec(image_size=16, resize=16, channels=3, **changed))
