"""Runs with random weights, made without training, whose outputs differ from image to image."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings

import torch
from torch import nn

from nearkin.config import CONFIG_FILE, RunConfig, to_yaml
from nearkin.data.transforms import EvalSpec
from nearkin.evaluation.model import FORMAT, Description, ModelSpec, build, save_bundle

CLASSES = ("cat", "dog", "eel")
METRICS = {
    "split": "test",
    "n": 50,
    "top1": 0.8,
    "top5": 1.0,
    "log_loss": 0.5,
    "ece": 0.05,
    "interval": [0.67, 0.89],
    "macro": {"precision": 0.8, "recall": 0.8, "f1": 0.79},
    "most_confused": {"true": "cat", "predicted": "dog", "images": 4},
}


def write_run(
    run,
    data,
    *,
    model="test_resnet",
    objective="ce",
    options=None,
    size=32,
    resize=None,
    channels=3,
    stem="default",
    classes=CLASSES,
    temperature=None,
    metrics=METRICS,
    config=None,
):
    """The folder of a finished run on `data`, a folder of class folders."""
    torch.manual_seed(0)
    spec = ModelSpec(
        model=model,
        channels=channels,
        image_size=size,
        stem=stem,
        objective=objective,
        options=options or {},
        classes=classes,
    )
    built = build(spec, images=100, batch_size=10)
    _spread(built.network, size)
    description = Description(
        format=FORMAT,
        nearkin="0.1.0",
        spec=built.spec,
        transform=EvalSpec(image_size=size, resize=resize or size, channels=channels),
        heads=tuple(built.network.heads),
        metrics=metrics,
        temperature=temperature,
    )
    run.mkdir(parents=True)
    save_bundle(run, description, built.network.state_dict())
    given = RunConfig(data=str(data), objective=objective, model=model, **(config or {}))
    (run / CONFIG_FILE).write_text(to_yaml(given))
    return run


def _spread(network, size):
    """Statistics and a classifier as after a training: without them all images would give the same output."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    classifier = network.heads[network.chain("logits")[-1]]
    if isinstance(classifier, nn.Linear):
        with torch.no_grad():
            # Noise of different brightness, as `write_image` makes it.
            noise = 0.3 * torch.rand(16, len(network.mean), size, size)
            logits = network.eval()(noise + torch.linspace(0, 0.7, 16).view(-1, 1, 1, 1)).logits
            classifier.bias -= logits.mean(0)
            for values in (classifier.weight, classifier.bias):
                values *= 2 / logits.std()


def run_card(folder, photo):
    """The outputs of the Python lines in a bundle's card, run as they stand on `photo`."""
    text = (folder / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    shutil.copy(photo, folder / "photo.jpg")
    try:
        with contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block, names)
    finally:
        (folder / "photo.jpg").unlink()
    return names["outputs"]
