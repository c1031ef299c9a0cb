"""`python -m benchmarks.first_step nearkin FOLDER | plain`: start, take one optimiser step on digits, leave.

Both ways leave at once after the step, so that neither pays for its end. `plain` is what a person would write by hand
with the same libraries; it imports them late, since the other way must not share the bill.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

MODEL, CHANNELS, CLASSES, BATCH, LR = "resnet10t", 1, 10, 32, 0.025


def nearkin(folder: str) -> None:
    """The command line with its default options, into a run folder that does not exist yet."""
    from nearkin.cli import run
    from nearkin.training.step import Stepper

    step = Stepper.step

    def only_step(*arguments: Any) -> Any:
        step(*arguments)
        os._exit(0)

    Stepper.step = only_step  # type: ignore[method-assign, assignment]
    sys.exit(run(["train", "--quiet", "--out", folder]) or 1)  # it should not have come back


def plain() -> None:
    """The same model, images, batch size and optimiser from the same libraries."""
    import lightning_fabric  # noqa: F401 - what it takes to load counts on both sides
    import numpy as np
    import pydantic  # noqa: F401
    import safetensors.torch  # noqa: F401
    import timm
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    rows, _ = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    model = small_model(timm)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, fused=True)
    batch = torch.as_tensor(rows[:BATCH])
    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    os._exit(0)


def small_model(timm: Any) -> Any:
    """The model that nearkin chooses for digits: its first layer keeps the resolution."""
    model = timm.create_model(MODEL, in_chans=CHANNELS, num_classes=CLASSES)
    model.get_submodule(model.pretrained_cfg["first_conv"]).stride = (1, 1)
    return model


if __name__ == "__main__":
    ways: dict[str, Callable[..., None]] = {"nearkin": nearkin, "plain": plain}
    ways[sys.argv[1]](*sys.argv[2:])
