"""Reads the Markdown pages: their code blocks, links and headings, and the commands in them."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

from nearkin.catalogue import recipe_or_file
from nearkin.cli import VERBS
from nearkin.cli.train import parser, with_data
from nearkin.config import RunConfig, merge, read_yaml, validate
from nearkin.objectives import Objective, get

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^ *(```+)(\S*)[^\n]*\n(.*?)^ *\1 *$\n?", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "console", "sh", "shell")
COMMAND = re.compile(r"^(?:\$ )?(?:(?:uv run|srun|torchrun|[A-Z_]+=)[^#]*? )?(?:-m )?nearkin (.*)")


def blocks(text):
    """(language, code) of each fenced code block."""
    return [(language, code) for _, language, code in FENCE.findall(text)]


def prose(text):
    """A page without its code blocks."""
    return FENCE.sub("", text)


def links(path):
    """The targets of all links and images of a page, those in code left out."""
    text = re.sub(r"`[^`\n]+`", "`", prose(path.read_text()))
    return [unquote(target) for target in re.findall(r"\]\(<?([^)\s>]+)", text)]


def headings(path):
    """The anchors of a page, as GitHub makes them."""
    found: list[str] = []
    for text in re.findall(r"^#+ +(.*?) *$", prose(path.read_text()), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(
            re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found
        )
        found.append(f"{anchor}-{count}" if count else anchor)
    return set(found)


def commands(text):
    """The words behind `nearkin` of every command in the shell blocks of a page."""
    code = "".join(code for language, code in blocks(text) if language in SHELL)
    lines = code.replace("\\\n", " ").splitlines()
    return [words(found.group(1)) for line in lines if (found := COMMAND.match(line))]


def inline_commands(text):
    """The same for code within sentences that names a verb."""
    found = re.findall(r"`([^`\n]+)`", prose(text))
    return [words(code[8:]) for code in found if re.match(r"nearkin [a-z-]+( |$)", code)]


def words(line):
    """A command as words, up to a pipe or a redirection; `[--option]` is one that may be given."""
    given = shlex.split(re.sub(r"[][]", "", line), comments=True)
    end = next((i for i, word in enumerate(given) if re.match(r"[|&;<>]|2>", word)), len(given))
    return [word for word in given[:end] if word != "..."]


def check(command):
    """Raise ConfigError unless the verb and its options exist; nothing is run."""
    verb, *rest = command
    if verb in ("--help", "--version"):
        return
    assert verb in VERBS, f"unknown verb {verb}"
    given = import_module(f"nearkin.cli.{VERBS[verb]}").parser().read(rest)
    objective = Objective.registry.get(given.get("objective"))
    if objective is not None:
        own = {key.partition(".")[2] for key in given if key.startswith("objective.")}
        unknown = own - set(objective.Config.model_fields)
        assert not unknown, f"{objective.name} has no option {unknown}"


def checked_train(command):
    """The configuration that the options of `nearkin train` ask for, checked as `train` checks it."""
    given = with_data(parser().read(command))
    recipes = [read_yaml(recipe_or_file(name)) for name in given.pop("config", [])]
    config = validate(RunConfig, merge(*recipes, given))
    validate(get(config.objective).Config, config.options, prefix="objective.")
    return config
