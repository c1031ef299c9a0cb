"""Image files that look different from each other, and the faults that tests plant among them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def photo(seed, size=(96, 80)):
    """Coloured blobs, with fine texture: sharp, of medium brightness, and unlike the photo of any other seed."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(blobs.resize(size, Image.Resampling.BICUBIC), np.int64)
    texture = rng.integers(-40, 41, (size[1], size[0], 1))
    return Image.fromarray(np.clip(smooth + texture, 0, 255).astype(np.uint8))


def write_photos(root, classes=("ant", "bee", "cow"), splits={"train": 12, "test": 4}):  # noqa: B006
    """SPLIT/CLASS/NUMBER.png, every image another photo."""
    seed = 0
    for split, each in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                photo(seed).save(folder / f"{number}.png")
                seed += 1
    return root


def one_colour(value, size=(96, 80)):
    return Image.new("RGB", size, (value, value, value))


def faint(low, high, size=(96, 80)):
    """Grey noise between two values."""
    rng = np.random.default_rng(low)
    grey = rng.integers(low, high, (size[1], size[0]), dtype=np.uint8)
    return Image.fromarray(grey).convert("RGB")


def blurred(seed):
    """A soft ramp from one side to the other."""
    ramp = np.linspace(60, 190, 96 * 80).reshape(80, 96) + seed
    return Image.fromarray(np.stack([ramp, ramp * 0.9, ramp * 0.7], axis=2).astype(np.uint8))
