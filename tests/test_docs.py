"""README and docs/: links and anchors exist, commands parse, the index reaches every page, the map is complete."""

from __future__ import annotations

import re
import runpy

import pytest
from tests.pages import (
    DOCS,
    PAGES,
    ROOT,
    blocks,
    check,
    commands,
    headings,
    inline_commands,
    links,
    words,
)
from tests.test_house import FLOORS

from nearkin.cli import VERBS
from nearkin.errors import ConfigError
from nearkin.objectives import Objective

SOURCE = ROOT / "src" / "nearkin"


def broken_links(path, root=ROOT):
    """Links of a page that lead to no file below `root`, or to no heading; addresses of the web are not tried."""
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        goal = path.parent / name if name else path
        there = goal.exists() and goal.resolve().is_relative_to(root)
        if not there or (anchor and anchor not in headings(goal)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading: here\n## Same\n## Same\n")
    text = (
        "[a](other.md) [b](other.md#a-heading-here) [c](no.md) [d](other.md#no) [e](https://x.y/z)\n"
        "[f](other.md#same-1) [g](other.md#same-2) ![h](no.png) `[i](code.md)` [j](/etc/passwd)\n"
        "```\n[k](block.md)\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    assert broken_links(tmp_path / "page.md", tmp_path) == [
        "no.md",
        "other.md#no",
        "other.md#same-2",
        "no.png",
        "/etc/passwd",
    ]


COMMANDS = {
    f"{path.relative_to(ROOT)}-{number}": command
    for path in PAGES
    for number, command in enumerate(commands(path.read_text()) + inline_commands(path.read_text()))
    if path.name != "CHANGELOG.md"
}


def test_there_are_commands():
    verbs = {command[0] for command in COMMANDS.values()}
    assert {"train", "compare", "evaluate", "predict", "fewshot", "list", "import-cone"} <= verbs
    assert len(COMMANDS) > 70


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_parse(name):
    check(COMMANDS[name])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nearkin train digits --epoch 3", ConfigError),
        ("uv run nearkin evaluate RUN --tat flip > file", ConfigError),
        ("torchrun --nproc-per-node 2 -m nearkin train DATA --lrr 1", ConfigError),
        ("$ nearkin trian digits", AssertionError),
        ("nearkin train DATA --objective supcon \\\n  --objective.topk 3", AssertionError),
        ("nearkin fewshot RUN DATA DATA DATA", ConfigError),
    ],
)
def test_a_wrong_command_would_be_found(line, error):
    (command,) = commands(f"text\n\n```python\nx = 1\n```\n\n```\n{line}  # why\n```\n")
    with pytest.raises(error):
        check(command)


def test_how_commands_are_read():
    assert (
        words("evaluate RUN ... [DATA] [--split val] | head  # why")
        == "evaluate RUN DATA --split val".split()
    )
    assert words("predict RUN new/ > answers.csv") == "predict RUN new/".split()
    assert commands("```python\nnearkin train x\n```\n") == []
    assert inline_commands("`nearkin train x` and `nearkin` and `nearkin.train`") == [
        ["train", "x"]
    ]


def known_options():
    """Every option of every verb and objective."""
    from importlib import import_module

    parsers = [import_module(f"nearkin.cli.{module}").parser() for module in VERBS.values()]
    own = [
        f"--objective.{field.replace('_', '-')}"
        for kind in Objective.registry.values()
        for field in kind.Config.model_fields
    ]
    return {option for each in parsers for option in each._option_string_actions} | set(own)


def test_options_named_in_sentences_exist():
    known, missing = known_options() | {"--debug", "--version"}, []
    for path in PAGES:
        for code in re.findall(r"`(--[^`\n]+)`", path.read_text()):
            option = re.match(r"--[\w.-]+", code).group(0)
            free = option.startswith("--model.") or option in (
                "--objective.NAME",
                "--objective.OPTION",
            )
            if not free and option not in known:
                missing.append((path.name, option))
    assert missing == []


def reached(start):
    """The pages of docs/ that links lead to, from page to page."""
    found, left = {start}, [start]
    while left:
        page = left.pop()
        for target in links(page):
            goal = (page.parent / target.partition("#")[0]).resolve()
            if goal.suffix == ".md" and goal.is_relative_to(DOCS) and goal not in found:
                found.add(goal)
                left.append(goal)
    return found


def test_the_index_reaches_every_page_and_picture():
    pages = set(DOCS.rglob("*.md"))
    assert pages - reached(DOCS / "index.md") == set()
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    pictures = {path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg", ".webp")}
    assert pictures - shown == set(), "no page shows them"


CONF = runpy.run_path(str(DOCS / "conf.py"))


def test_the_navigation_of_the_site_has_every_page_once():
    """What Sphinx would warn of, without Sphinx."""
    listed = []
    for page in [DOCS / "index.md", *DOCS.glob("*/README.md")]:
        toctrees = CONF["navigation"](page.read_text(), captions=page.stem == "index")
        for _, code in blocks(toctrees):
            entries = [line for line in code.splitlines() if line and not line.startswith(":")]
            listed += [(page.parent / f"{entry}.md").resolve() for entry in entries]
    assert sorted(listed) == sorted(set(DOCS.rglob("*.md")) - {DOCS / "index.md"})


def test_navigation():
    text = "- [no](#first)\n## First\n| [a](a.md) | [b](b.md) |\n| [up](../c.md) |\n## Second\n1. [d](x/d.md)\n"
    assert CONF["navigation"](text, captions=True) == (
        "\n```{toctree}\n:hidden:\n:caption: First\n\na\n```\n"
        "\n```{toctree}\n:hidden:\n:caption: Second\n\nx/d\n```\n"
    )


def test_docstrings_become_restructured_text():
    docstring = (
        "First *line*.\n\n    L_i = a_ip |P|\n\nrows, other: `[N, d]` of w_.\nlabels: `[N]`. margin > 0. Invalid:\n"
        "none. Raises ValueError. Source: A 2020.\n"
    )
    assert CONF["restructured"](docstring, ["rows", "other", "labels", "margin"]).split("\n\n") == [
        r"First \*line\*.",
        "::",
        "    L_i = a_ip |P|",
        r"- **rows, other**: \ ``[N, d]``\  of w\_.",
        r"- **labels**: \ ``[N]``\ .",
        "- **margin** > 0.",
        "Invalid: none.",
        "Raises ValueError.",
        "Source: A 2020.\n",
    ]


def rooms_of(text):
    """The rooms in the map of docs/architecture.md."""
    plan = blocks(text)[0][1]
    return {line.split()[0].strip("/") for line in plan.splitlines() if re.match(r"  \w", line)}


def test_the_map_of_the_rooms_is_complete():
    text = (DOCS / "architecture.md").read_text()
    rooms = {p.name for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms_of(text) == rooms - {"__init__.py", "__main__.py"}
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", text.partition("## How to add")[0])
    assert len(named) > 20
    assert [n for n in named if not (SOURCE / n).exists() and not (ROOT / n).exists()] == []


def test_the_order_of_the_imports_is_that_of_the_rules():
    (line,) = re.findall(r"^`errors.*<-.*$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    floors = [set(floor.strip(" `.").split(", ")) for floor in line.split("<-")]
    assert floors == FLOORS[:-1]
