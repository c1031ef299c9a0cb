"""docs/troubleshooting.md quotes messages as the code has them, and options that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import nearkin
from nearkin.config import RunConfig

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.M)
SOURCE = [ast.parse(path.read_text()) for path in Path(nearkin.__file__).parent.rglob("*.py")]
TEXTS = [
    node.value
    for tree in SOURCE
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
]
# Options of other verbs, and of other programs.
OTHER = {
    "--debug",
    "--resume",
    "--quiet",
    "--split",
    "--tta",
    "--shm-size",
    "--tune",
    "--master-port",
}


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_code(message):
    assert any(message in text for text in TEXTS)


def test_a_message_that_is_not_in_the_code_would_be_found():
    assert len(QUOTED) > 20
    assert not any("this is no message" in text for text in TEXTS)


def test_its_options_exist():
    options = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - OTHER
    assert options <= {f"--{name.replace('_', '-')}" for name in RunConfig.model_fields}
