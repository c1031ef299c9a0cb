"""Options: what is accepted, what is refused and in which words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from nearkin.config import RunConfig, merge, read_yaml, to_yaml, validate
from nearkin.errors import ConfigError
from nearkin.settings import Settings
from nearkin.training.options import TrainOptions


def refused(values):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, values)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_words_become_values():
    config = validate(
        RunConfig, {"epochs": "3", "lr": "0.1", "flip": "true", "objective.topk": "5"}
    )
    assert (config.epochs, config.lr, config.flip) == (3, 0.1, True)
    assert config.options == {"topk": "5"}
    assert validate(RunConfig, {"epochs": "auto"}).epochs == "auto"


def test_none_undoes_an_option_that_may_be_none():
    given = {"clip_grad": "none", "images_per_class": "none", "weights": "none", "log": "none"}
    config = validate(RunConfig, given)
    assert [getattr(config, name) for name in given] == [None] * 4
    assert "should be" in refused({"epochs": "none"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": "many"}, "--epochs 'many'"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"batch_sise": 3}, "Unknown option --batch-sise. Did you mean --batch-size?"),
        ({"augment": "heavy"}, "'light'"),
        ({"val_split": 1.5}, "less than 1"),
        ({"lr": float("nan")}, "--lr 'nan'"),
        ({"batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_refusals_are_one_sentence_that_names_the_option(values, words):
    assert words in refused(values)


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().epochs = 3


@pytest.mark.parametrize("word", ["off", "'off'", "Off", "ram"])
def test_off_is_a_word_in_yaml_too(tmp_path, word):
    (tmp_path / "run.yaml").write_text(f"cache: {word}\n")
    config = validate(RunConfig, read_yaml(tmp_path / "run.yaml"))
    assert config.cache == ("ram" if word == "ram" else "off")


def test_yaml_round_trip(tmp_path):
    config = validate(
        RunConfig, {"data": "no: yes", "objective": "cone", "objective.topk": 7, "lr": 0.3}
    )
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert validate(RunConfig, read_yaml(path)) == config


def test_options_of_an_objective_without_its_name_choose_none(tmp_path):
    (tmp_path / "c.yaml").write_text("objective: {attach: projection}")
    found = read_yaml(tmp_path / "c.yaml")
    assert found["objective"] == "auto"
    assert merge(found, {"objective": "supcon"})["objective.attach"] == "projection"


def test_hyphens_are_underscores_in_yaml_too(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("batch-size: 8\nobjective: {name: cone, neighbour-weight: 0.5}")
    wanted = {"batch_size": 8, "objective": "cone", "objective.neighbour_weight": 0.5}
    assert read_yaml(path) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "batch-size: 8\nbatch_size: 16",
        "objective: {neighbour-weight: 1, neighbour_weight: 2}",
        "objective: {topk: 1}\nobjective.topk: 2",
    ],
)
def test_a_name_given_twice_in_yaml_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml gives \S+ twice"):
        read_yaml(tmp_path / "c.yaml")


def test_later_layers_win_and_another_objective_drops_its_rivals_options():
    merged = merge({"objective": "cone", "objective.topk": 3, "lr": 1}, {"lr": 2})
    assert merged == {"objective": "cone", "objective.topk": 3, "lr": 2}
    assert merge(merged, {"objective": "ce"}) == {"objective": "ce", "lr": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "given twice"),
        ("- 1\n- 2\n", "holds no options"),
        ("a: !!python/object/apply:os.system ['touch owned']\n", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: [1\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("out: 2026-02-30\n", "not valid YAML"),
        ("seed: 0b_\n", "not valid YAML"),
        ("seed: !!int x\n", "not valid YAML"),
        (f"seed: {'9' * 5000}\n", "not valid YAML"),
        ("epochs: !!bool maybe\n", "not valid YAML"),
        ("out: !!timestamp x\n", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_billion_laughs_and_huge_files_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [lol]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
    ]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(path)
    path.write_bytes(b"a" * (2 << 20))
    for endless in (path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="1 MiB"):
            read_yaml(endless)
    path.write_text("".join(f"k{number}: 1\n" for number in range(60_000)))
    assert len(read_yaml(path)) == 60_000
    assert time.perf_counter() - started < 30  # a bomb would take hours


def test_missing_and_binary_configs(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "b.yaml")


def plain(kind):
    """A type without its limits."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return frozenset().union(*(plain(part) for part in get_args(kind)))
    if get_origin(kind) is Literal:
        return frozenset(get_args(kind))
    return frozenset({get_origin(kind) or kind})


def test_the_typed_options_of_train_are_those_of_the_configuration():
    fields = get_type_hints(RunConfig, include_extras=True)
    expected = {name: plain(fields[name]) for name in RunConfig.model_fields}
    given = {name: plain(kind) for name, kind in get_type_hints(TrainOptions).items()}
    for name in ("weights", "out"):  # a path may be a str
        expected[name] |= {str}
    assert given["model_options"] == {Mapping}
    given["model_options"] = expected["model_options"] = None
    assert given == {n: k for n, k in expected.items() if n not in ("data", "objective", "options")}


def test_settings_have_no_auto_and_are_options_again():
    fields = get_type_hints(Settings, include_extras=True)
    assert set(Settings.model_fields) == set(RunConfig.model_fields)
    # How files are looked at is decided anew in each start.
    assert {name for name in Settings.model_fields if "auto" in plain(fields[name])} == {"check"}
    assert issubclass(Settings, RunConfig)
    required = {name for name, field in Settings.model_fields.items() if field.is_required()}
    automatic = {name for name, field in RunConfig.model_fields.items() if field.default == "auto"}
    # Photos start from pretrained weights although the option is off.
    assert required == (automatic - {"model", "check"}) | {"pretrained"}
