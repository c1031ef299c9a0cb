"""Objectives, recipes and loggers by name, found without importing torch."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from nearkin.errors import ConfigError, nearest, printable
from nearkin.hints import unknown_option, value_hint

ENTRY_POINTS = "nearkin.objectives"  # group in which other packages offer objectives
RECIPES = Path(__file__).with_name("recipes")
LOGGERS = ("tensorboard", "wandb", "mlflow")  # what `--log` takes, and the extras that bring them


class ObjectiveEntry(NamedTuple):
    """summary: first line of its docstring. options: names of the fields of its `Config`, or None where unknown."""

    summary: str
    options: tuple[str, ...] | None


@cache
def objectives() -> dict[str, ObjectiveEntry]:
    """The objectives by name, in alphabetical order: the built-in ones, then those of other packages.

    The built-in ones are read from the syntax trees of their files; of the others only the name is known.
    """
    files = sorted(Path(__file__).with_name("objectives").glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    found = {
        point.name: ObjectiveEntry(f"from {point.value}", None)
        for point in entry_points(group=ENTRY_POINTS)
    }
    for node in classes.values():
        for keyword in node.keywords:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                # Once each: a class may give an option of its base another default or description.
                options = tuple(dict.fromkeys(_options(node, classes)))
                found[str(keyword.value.value)] = ObjectiveEntry(summary, options)
    return dict(sorted(found.items()))


def _options(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            yield from _options(classes[base.id], classes)
    for part in node.body:
        if isinstance(part, ast.ClassDef) and part.name == "Config":
            fields = (field.target for field in part.body if isinstance(field, ast.AnnAssign))
            yield from (field.id for field in fields if isinstance(field, ast.Name))


def check_objective(name: str, options: Iterable[str] = ()) -> None:
    """Raises ConfigError for an unknown objective, or for an option that it does not have.

    Accepts an unknown name where other packages or the caller may define it: `nearkin.objectives.get` decides then.
    """
    known = objectives()
    if name not in known:
        if not entry_points(group=ENTRY_POINTS) and "nearkin.objectives" not in sys.modules:
            raise unknown_objective(name, known)
        return
    fields = known[name].options
    for option in options:
        if fields is not None and option not in fields:
            shown = f"--objective.{option.replace('_', '-')}"
            raise unknown_option(shown, fields, prefix="--objective.")


def unknown_objective(name: str, known: Iterable[str]) -> ConfigError:
    """The error for an objective that is none of `known`."""
    names = sorted(known)
    hint = value_hint("objective", name, names)
    return ConfigError(f"Unknown objective {printable(name)}.{hint} There are: {', '.join(names)}.")


def recipes() -> list[str]:
    """The recipes that come with nearkin, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_or_file(name: str) -> Path:
    """The file of that name, or the recipe that comes with nearkin where there is no such file.

    Raises ConfigError when there is neither.
    """
    if os.path.exists(name):  # noqa: PTH110 - Path.exists raises for a name that is too long
        return Path(name)
    stem = name.removesuffix(".yaml")
    if stem in recipes():
        return RECIPES / f"{stem}.yaml"
    hint = nearest(stem, recipes()) or " nearkin list recipes shows the recipes."
    raise ConfigError(f"The config {printable(name)} is neither a file nor a recipe.{hint}")


def known_loggers(log: str | None) -> str | None:
    """The names, each once; `none` is no logger. Raises ValueError for an unknown one."""
    words = [word.strip() for word in (log or "none").split(",")]
    for word in words:
        if word not in (*LOGGERS, "none"):
            hint = nearest(word, LOGGERS)
            raise ValueError(
                f"there is no logger {printable(word)!r}.{hint} There are: {', '.join(LOGGERS)}, none"
            )
    return ",".join(dict.fromkeys(word for word in words if word != "none")) or None
