"""A trained run on a quarter of the digits, and its images as files."""

from __future__ import annotations

import numpy as np
from PIL import Image

import nearkin
from nearkin.data.sources.resolve import resolve


def trained(folder):
    options = {"epochs": 2, "images_per_class": 20, "model": "test_resnet", "threads": 1}
    return nearkin.train("digits", "ce", workers=0, out=folder, **options).run


def some_digits(count=None):
    """Arrays uint8 `[8, 8, 1]` of the test split, and their classes."""
    part = resolve("digits").parts["test"]
    labels = [part.classes[label] for label in part.labels]
    return list(part.images.array)[:count], labels[:count]


def write_digits(folder, count):
    """As files `00.png`, ... in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(some_digits(count)[0]):
        Image.fromarray(np.squeeze(array)).save(folder / f"{number:02d}.png")
    return folder
