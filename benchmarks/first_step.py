"""`python -m benchmarks.first_step WAY ...`: start, take one optimiser step or predict one image, leave.

All ways leave at once, so that none pays for its end. The plain ways are what a person would write with torch and timm;
they import late, since the other ways must not pay for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL, CHANNELS, CLASSES, SIDE, BATCH, LR = "resnet10t", 1, 10, 8, 32, 0.025
NARROW: dict[str, Any] = {"channels": [48, 96, 192, 384], "stem_width": 24}


def train(folder: str) -> None:
    """The command line with its default options, into a run folder that does not exist yet."""
    from nearkin.cli import run
    from nearkin.training.step import Stepper

    step = Stepper.step

    def only_step(*arguments: Any) -> Any:
        step(*arguments)
        os._exit(0)

    Stepper.step = only_step  # type: ignore[method-assign, assignment]
    sys.exit(run(["train", "--quiet", "--out", folder]) or 1)  # it should not have come back


def plain_train() -> None:
    """The same model, batch size and optimiser from the same libraries, on random images."""
    import timm
    import torch

    model = small_model(timm)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, fused=True)
    images, labels = torch.rand(BATCH, CHANNELS, SIDE, SIDE), torch.randint(CLASSES, (BATCH,))
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    os._exit(0)


def prepare(folder: str) -> None:
    """`folder`/run, a finished run on digits, and `folder`/image.png."""
    import numpy as np
    from PIL import Image

    from nearkin import train

    place = Path(folder)
    train(out=place / "run", epochs=1, objective="ce")
    pixels = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    Image.fromarray(pixels).save(place / "image.png")


def plain_predict(run: str, image: str) -> None:
    """The class of one image by the weights of a run, with torch and timm."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    load_file(str(Path(run) / "model.safetensors"))
    model = small_model(timm).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(image).convert("L"), np.float32) / 255)
    with torch.inference_mode():
        model(pixels[None, None]).softmax(1).argmax()
    os._exit(0)


def small_model(timm: Any) -> Any:
    """The model that nearkin chooses for digits: its first layer keeps the resolution."""
    model = timm.create_model(MODEL, in_chans=CHANNELS, num_classes=CLASSES, **NARROW)
    model.get_submodule(model.pretrained_cfg["first_conv"]).stride = (1, 1)
    return model


if __name__ == "__main__":
    ways: dict[str, Callable[..., None]] = {
        way.__name__: way for way in (train, plain_train, prepare, plain_predict)
    }
    ways[sys.argv[1]](*sys.argv[2:])
