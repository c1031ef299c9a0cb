"""What the catalogue reads from source files is what the classes say when they are imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearkin import catalogue
from nearkin.errors import ConfigError
from nearkin.objectives import Objective, get

RECIPES = Path(catalogue.__file__).with_name("recipes")


def built_in():
    return {
        name: kind
        for name, kind in Objective.registry.items()
        if kind.__module__.startswith("nearkin.objectives.")
    }


def test_objectives_are_those_of_the_registry():
    assert list(catalogue.objectives()) == sorted(built_in())


@pytest.mark.parametrize("name", sorted(built_in()))
def test_summary_and_options_are_those_of_the_class(name):
    entry, kind = catalogue.objectives()[name], get(name)
    assert entry.summary == kind.__doc__.strip().splitlines()[0]
    assert sorted(entry.options) == sorted(kind.Config.model_fields)


def test_names_that_other_code_may_define_are_left_to_the_registry(monkeypatch):
    monkeypatch.delitem(catalogue.sys.modules, "nearkin.objectives")
    with pytest.raises(ConfigError, match="Unknown objective kone. Did you mean cone"):
        catalogue.check_objective("kone")
    with pytest.raises(ConfigError, match="--objective.topc. Did you mean --objective.topk"):
        catalogue.check_objective("cone", ["topc"])
    catalogue.check_objective("cone", ["topk"])
    monkeypatch.setattr(catalogue, "entry_points", lambda **_: ["another package"])
    catalogue.check_objective("kone", ["topc"])


def test_an_objective_of_the_caller_is_accepted():
    catalogue.check_objective("of a notebook")
    with pytest.raises(ConfigError, match="Unknown objective of a notebook"):
        get("of a notebook")


def test_recipes(tmp_path, monkeypatch):
    assert catalogue.recipes() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    for name in ("digits-cone", "digits-cone.yaml"):
        assert catalogue.recipe_or_file(name) == RECIPES / "digits-cone.yaml"
    Path("digits-cone").touch()
    assert catalogue.recipe_or_file("digits-cone") == Path("digits-cone")
    with pytest.raises(
        ConfigError, match="digits-con is neither a file nor a recipe. Did you mean"
    ):
        catalogue.recipe_or_file("digits-con")
    with pytest.raises(ConfigError, match="neither a file"):
        catalogue.recipe_or_file("x" * 1_000)
