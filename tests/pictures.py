"""Small real image files that tests make themselves."""

from __future__ import annotations

import numpy as np
from PIL import Image


def write_image(path, label=0, number=0, size=(20, 16), mode="RGB"):
    """A noisy image whose mean tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1000 * label + number)
    pixels = rng.integers(0, 80, (size[1], size[0], 3)) + 55 * (label % 4)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode).save(path)
    return path


def write_classes(root, classes=("cat", "dog"), each=12, suffix=".png"):
    """A folder of class folders."""
    for label, name in enumerate(classes):
        for number in range(each):
            write_image(root / name / f"{number}{suffix}", label, number)
    return root
