"""Every recipe is valid as it stands, says where it comes from, and trains for two steps on small data."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tests.pictures import write_classes

from nearkin.cli import run
from nearkin.config import RunConfig, read_yaml, validate
from nearkin.data.sources.builtin import BUILTIN
from nearkin.objectives import get
from nearkin.training.api import start_run

FOLDER = Path(str(files("nearkin") / "recipes"))
RECIPES = sorted(path.stem for path in FOLDER.iterdir() if path.suffix == ".yaml")
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
TERMS = ("ce", "bce", "sce", "neighbour", "consistency", "schane")
IMAGENET = 1_281_167  # training images
# What the two steps may change: depth, side, batch, length, data; and what depends on the machine.
CHANGED = {
    "data",
    "model_options",
    "image_size",
    "eval_size",
    "batch_size",
    "epochs",
    "objective.warmup_steps",  # an epoch, written in steps
    "objective.topk",  # from auto, of a bank of 8
    "precision",  # fp16 is refused on a CPU by design
    "device",
    "workers",
    "threads",
    "out",
}


def recipe(name):
    return read_yaml(FOLDER / f"{name}.yaml")


def comment(name):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_the_promised_recipes_are_there():
    promised = {f"imagenet-resnet50-{end}" for end in ("cone-100ep", "a1", "a2", "a3")}
    assert promised | {"imagenet-beit3b-schane", "viprior-attract-repulse"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_valid_as_it_stands(name):
    values = recipe(name)
    config = validate(RunConfig, values)
    options = validate(get(config.objective).Config, config.options, prefix="objective.")
    flat = config.flat()
    for key, value in values.items():  # nothing is read as something else
        if not key.startswith(("objective.", "model.")):
            assert flat[key] == value, key
    stored = options.model_dump(mode="json")
    assert config.options.items() <= stored.items()


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_where_it_comes_from(name):
    text = comment(name)
    if recipe(name)["data"] not in BUILTIN:
        assert "arXiv" in text
        assert f"--config {name}" in text
        assert any(word in text for word in ("not run here", "no reproduction")), "whose numbers?"
    assert f"`{name}`" in DOCS.read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_without_data_it_trains_on_nothing_else(name, tmp_path, monkeypatch, capsys):
    data = recipe(name)["data"]
    if data in BUILTIN:
        assert name.startswith(data)
        return
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--config", name, "--precision", "fp32", "--device", "cpu"]) == 3
    assert f"'{data}' are missing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def small(values, folder):
    """The recipe with one block a stage or two layers, 64 pixels for 224, 8 images a step, 1 step an epoch."""
    depth = {"resnet50": {"layers": [1, 1, 1, 1]}, "beit3_base_patch16_224.pt": {"depth": 2}}
    shrunk = {key: values[key] * 64 // 224 for key in ("image_size", "eval_size") if key in values}
    model = {f"model.{k}": v for k, v in depth.get(values.get("model"), {}).items()}
    warmup = {key: 1 for key in values if key == "objective.warmup_steps"}
    if values.get("objective") == "cone" and "objective.topk" not in values:
        warmup["objective.topk"] = (
            8  # the whole bank, so that both classes are among the neighbours
        )
    machine = {"device": "cpu", "precision": "fp32", "workers": 0, "threads": 1}
    length = {"batch_size": 8, "epochs": 2}
    return values | shrunk | model | warmup | machine | length | {"data": str(folder / "images")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 training and 4 test images of two classes."""
    folder = tmp_path_factory.mktemp("data")
    write_classes(folder / "images" / "train", each=6)
    write_classes(folder / "images" / "test", each=2)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps(name, images, tmp_path, monkeypatch):
    fetched = []

    def random_instead(model):
        fetched.append(model)
        return {}

    monkeypatch.setattr("nearkin.network.backbone.pretrained_options", random_instead)
    values = recipe(name)
    result = start_run(small(values, images) | {"out": tmp_path / "run"}, quiet=True)

    assert fetched == ([values["model"]] if values.get("pretrained") else [])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 2, 2)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    last = [record for record in records if record["kind"] == "epoch"][-1]
    terms = {k: v for k, v in last.items() if k in TERMS}
    assert terms
    assert min(terms.values()) > 0, "a part of the loss sleeps"
    assert result.metrics["split"] == "test"
    assert result.metrics["n"] == 4
    stored = read_yaml(tmp_path / "run" / "config.yaml")
    same = {k: v for k, v in values.items() if k not in CHANGED}
    assert {k: stored[k] for k in same} == same


def test_the_cone_recipe_is_the_published_run():
    """Every setting, from the paper's published code: a second, independent list."""
    values = recipe("imagenet-resnet50-cone-100ep")
    steps = IMAGENET // values["batch_size"]
    published = {
        "model": "resnet50",
        "epochs": 100,
        "batch_size": 8 * 128,
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "decay_all": True,
        "lr": 0.1 * 1024 / 256,
        "warmup_epochs": 5,
        "min_lr_ratio": 1 / 1000,
        "precision": "fp16",
        "image_size": 224,
        "crop_scale": 0.08,
        "flip": True,
        "objective.smoothing": 0,
        "objective.neighbour_weight": 0.7,
        "objective.consistency_weight": 0.4,
        "objective.neighbour_temperature": 0.1,
        "objective.consistency_temperature": 0.07,
        "objective.bank": 2**16,
        "objective.topk": 512,
        "objective.guard": True,
        "objective.hidden": 4096,
        "objective.embedding": 256,
        "objective.teacher_schedule": "cosine",
        "objective.teacher_momentum": 0.996,
        "objective.teacher_batchnorm": "own",
        "objective.teacher_crop": "same",
        "objective.warmup_steps": steps,
    }
    assert {key: values[key] for key in published} == published
    assert round(values["eval_size"] / values["eval_crop"]) == 256
    off = ("randaugment", "jitter", "grey_prob", "erasing", "mixup", "cutmix", "val_split")
    assert {values[key] for key in off} == {0}
    options = get("cone").Config(**validate(RunConfig, values).options)
    with torch.device("meta"):
        heads = get("cone")(options, dim=2048, classes=1000).heads
    shapes = [tuple(p.shape) for p in heads["projection"].module.parameters() if p.ndim == 2]
    assert shapes == [(4096, 2048), (256, 4096)]
    assert heads["classifier"].reads == "embedding"


def test_the_schane_recipes_end_at_the_published_rate():
    for name in ("imagenet-beit3b-schane", "fewshot-beit3b-schane"):
        values = recipe(name)
        assert values["lr"] * values["min_lr_ratio"] == pytest.approx(1e-6, rel=1e-9)
        assert values["jitter"] / 4 == 0.1
