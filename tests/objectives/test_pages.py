"""docs/methods: a page per objective that cannot go stale."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import BaseModel, Field
from tests.pages import DOCS, blocks, checked_train, commands

from nearkin.cli import run
from nearkin.config import read_yaml
from nearkin.errors import ConfigError
from nearkin.objectives import Objective, get

FOLDER = DOCS / "methods"
# Objectives of plug-ins or of other tests may be registered, too; they bring no page.
OWN = sorted(n for n, k in Objective.registry.items() if k.__module__.startswith("nearkin."))
SECTIONS = (
    "Heads and stages",
    "Options",
    "When to use it, and when not",
    "What differs from the paper",
    "Soft labels",
    "Run it",
    "Source",
)
HEADER = ["`--objective.NAME`", "default", "range", "meaning"]
WIDTH = 110


def page(name):
    return (FOLDER / f"{name}.md").read_text()


def table(text):
    """The cells of the first table of a text, without its ruler."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group(0).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def option_rows(config):
    """What a table has to say of a Config, from its JSON schema."""
    return [
        [
            f"`{name.replace('_', '-')}`",
            _default(field["default"]),
            _range(field),
            field["description"],
        ]
        for name, field in config.model_json_schema()["properties"].items()
    ]


def _default(value):
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _range(field):
    return " or ".join(_kind(part) for part in field.get("anyOf", [field]))


def _kind(part):
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    if part["type"] in ("boolean", "null"):
        return {"boolean": "true, false", "null": "none"}[part["type"]]
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }
    limits = ", ".join(f"{word} {part[key]:g}" for key, word in words.items() if key in part)
    return f"whole, {limits}" if part["type"] == "integer" else limits


def training(text):
    """The options of the `nearkin train` lines in the code blocks of a text."""
    return [rest for verb, *rest in commands(text) if verb == "train"]


def listed(capsys):
    assert run(["list", "objectives"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(maxsplit=1) for line in lines), lines


def test_every_objective_has_a_page_and_every_page_an_objective():
    assert sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README") == OWN


@pytest.mark.parametrize("name", OWN)
def test_a_page_has_all_sections(name):
    text = page(name)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(SECTIONS)
    assert 40 <= text.count("\n") <= 90
    before = text.partition("## ")[0]
    assert {language for language, _ in blocks(before)} == {"math"}, "the equations"
    assert re.search(r"arXiv \d{4}\.\d{5}", text.partition("## Source")[2])


@pytest.mark.parametrize("name", OWN)
def test_the_options_are_those_of_the_config(name):
    assert table(page(name).partition("## Options")[2]) == [HEADER, *option_rows(get(name).Config)]


def test_a_stale_table_would_be_found():
    class Config(BaseModel):
        pull: float = Field(0.5, gt=0, le=1, description="how strongly")
        size: int | None = Field(None, ge=1, description="how many")

    rows = [["`pull`", "0.5", "above 0, to 1", "how strongly"]]
    rows += [["`size`", "none", "whole, from 1 or none", "how many"]]
    assert option_rows(Config) == rows

    class Changed(Config):
        pull: float = Field(0.6, gt=0, description="how strongly")
        further: bool = Field(False, description="one more")

    assert option_rows(Changed) == [
        ["`pull`", "0.6", "above 0", "how strongly"],
        rows[1],
        ["`further`", "false", "true, false", "one more"],
    ]


def test_pages_and_index_open_with_what_the_list_says(capsys):
    said, lines = listed(capsys)
    assert max(len(line) for line in lines if line.split()[0] in OWN) <= WIDTH
    for name in OWN:
        assert page(name).splitlines()[:3] == [f"# `{name}`", "", said[name]]
        assert re.search(r"\(arXiv \d{4}\.\d{5}\)\.$", said[name]), "the source"
    index = table(page("README"))[1:]
    assert index == [[f"[`{name}`]({name}.md)", said[name]] for name in OWN]


@pytest.mark.parametrize("name", OWN)
def test_the_commands_are_valid(name):
    configs = [checked_train(words) for words in training(page(name))]
    assert {config.objective for config in configs} == {name}
    assert configs[0].data == "digits"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nearkin train digits --epoch 3", "Unknown option --epoch"),
        (
            "nearkin train digits --objective ce --objective.los bce",
            "Unknown option --objective.los",
        ),
        ("nearkin train digits --objective triplet --objective.margin -1", "--objective.margin"),
        ("nearkin train digits --config no-such-recipe", "no-such-recipe"),
    ],
)
def test_a_wrong_command_would_be_found(line, words):
    (found,) = training(f"text\n\n```\n{line}  # why\n```\n")
    with pytest.raises(ConfigError) as caught:
        checked_train(found)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", OWN)
def test_a_page_names_its_recipes(name):
    folder = Path(str(files("nearkin") / "recipes"))
    mine = {p.stem for p in folder.glob("*.yaml") if read_yaml(p)["objective"] == name}
    text = page(name).partition("## Run it")[2]
    assert {recipe for recipe in mine if f"`{recipe}`" not in text} == set()
    assert ("There is no recipe." in text) == (not mine)
