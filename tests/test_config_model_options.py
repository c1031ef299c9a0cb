"""Options of the timm model: which names and values pass, in every way they can come in."""

from __future__ import annotations

import inspect
import json

import pytest

from nearkin.config import RunConfig, merge, read_yaml, reserved, to_yaml, validate
from nearkin.errors import ConfigError


def options(**given):
    return validate(RunConfig, {f"model.{k}": v for k, v in given.items()}).model_options


def refused(**given):
    with pytest.raises(ConfigError) as caught:
        options(**given)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("2", 2),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("-1", -1),
        ("true", True),
        ("False", False),
        ("[1,1,1,1]", [1, 1, 1, 1]),
        ("[1, 0.5, true]", [1, 0.5, True]),
        (2, 2),
        ([3, 4], [3, 4]),
        ((3, 4), [3, 4]),
    ],
)
def test_words_become_numbers_switches_and_lists(word, value):
    made = options(depth=word)["depth"]
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "resnet50",
        "../weights.pth",
        "https://example.org/net.pth",
        "nan",
        ".inf",
        "16385",
        "-1e9",
        "1" * 400,
        "null",
        "2020-01-01",
        "{a: 1}",
        "[]",
        "[a]",
        "[[1]]",
        "&a [*a]",
        "[" * 100,
        "!!python/name:os.system",
        str([1] * 17),
        None,
        {"a": 1},
        float("nan"),
        10**400,
        [float("inf")],
        b"1",
    ],
)
def test_values_that_could_name_or_cost_something_are_refused(value):
    assert refused(depth=value).startswith("--model.depth ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pretrained", "use --pretrained"),
        ("pretrained_cfg", "cannot be set"),
        ("pretrained_anything_new", "cannot be set"),
        ("checkpoint_path", "use --weights"),
        ("img_size", "use --image-size"),
        ("in_chans", "use --channels"),
        ("drop_path_rate", "use --drop-path"),
        ("num_classes", "leave it out"),
        ("features_only", "leave it out"),
        ("__class__", "no name"),
        ("a.b", "no name"),
        ("", "no name"),
        ("x" * 41, "no name"),
        ("bad\nname", "no name"),
    ],
)
def test_names_that_are_not_the_models_own_are_refused(name, says):
    assert says in refused(**{name: 1})


def test_what_timms_builders_read_themselves_is_reserved():
    """A newer timm with a new argument fails here."""
    import timm
    from timm.models._builder import build_model_with_cfg

    builders = (timm.create_model, build_model_with_cfg)
    known = {name for builder in builders for name in inspect.signature(builder).parameters}
    assert {n for n in known if not n.startswith("pretrained")} <= set(reserved())


def test_too_many():
    assert "fewer" in refused(**{f"option{number}": 1 for number in range(33)})


def test_they_travel_as_the_objectives_do(tmp_path):
    config = validate(
        RunConfig,
        {"model": "resnet18", "model.layers": "[1,1,1,1]", "objective": "ce", "model.depth": 2},
    )
    assert config.flat()["model.layers"] == [1, 1, 1, 1]
    assert "model_options" not in config.flat()
    assert validate(RunConfig, config.flat()) == config
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert "model.layers:" in path.read_text()
    assert validate(RunConfig, read_yaml(path)) == config
    json.dumps(config.flat())


def test_another_model_drops_the_options_of_the_earlier_one():
    recipe = {"model": "resnet18", "model.layers": [1], "objective": "ce", "objective.loss": "bce"}
    assert merge(recipe, {"model": "resnet18"}) == recipe
    assert merge(recipe, {"model.layers": [2]}) == recipe | {"model.layers": [2]}
    changed = merge(recipe, {"model": "vit_tiny_patch16_224"})
    assert "model.layers" not in changed
    assert changed["objective.loss"] == "bce"


def test_a_field_that_is_no_mapping_is_told():
    with pytest.raises(ConfigError, match="--model-options"):
        validate(RunConfig, {"model_options": 3})
