"""`--decode scaled` reaches the training images, and nothing that a model is judged on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nearkin.config import RunConfig
from nearkin.distributed import Runtime
from nearkin.training.prepare import prepare


@pytest.fixture
def photos(tmp_path):
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (240, 320, 3))
    for number in range(24):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pixels, 7 * number, 1)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(("decode", "shape"), [("full", (3, 240, 320)), ("scaled", (3, 60, 80))])
def test_only_training_images_are_scaled(photos, decode, shape):
    options = {"model": "test_resnet", "image_size": 32, "crop_scale": 0.35, "batch_size": 8}
    config = RunConfig(data=str(photos), objective="ce", decode=decode, cache="off", **options)
    runtime = Runtime(device="cpu", precision="fp32")
    splits = prepare(config, runtime).dataset.splits
    runtime.close()
    assert {splits["train"].images.read(row).shape for row in range(8)} == {shape}
    assert splits["val"].images.read(0).shape == (3, 240, 320)
