"""The examples, and the Python blocks of the README and of docs/, run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tests.pictures import write_classes

from nearkin.objectives import Objective

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    f"{page.relative_to(ROOT)}-{number}": code
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    )
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder with `photos/`; objectives that a block defines are forgotten afterwards."""
    write_classes(tmp_path / "photos", each=30, suffix=".jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small networks; other tests run beside this one
    yield
    torch.set_num_threads(threads)


# Least accuracy that an example prints: of ten classes, in few_shot.py of three.
LEARNS = {"own_loop.py": 0.9, "with_accelerate.py": 0.9, "few_shot.py": 0.7, "compare.py": 0.6}


SLOW = {"compare.py"}  # starts a process for each run


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW), id=p.name) for p in EXAMPLES],
)
def test_examples_run_and_learn(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    found = re.findall(r"test top-1 ([\d.]+)", capsys.readouterr().out)
    assert found
    assert all(float(accuracy) > LEARNS[path.name] for accuracy in found)


def test_the_example_of_an_own_loop_is_short():
    assert len((ROOT / "examples" / "own_loop.py").read_text().splitlines()) <= 40


def test_there_are_blocks():
    assert any(name.startswith("README.md") for name in BLOCKS)
    assert {path.name for path in EXAMPLES} == set(LEARNS)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_docs_run(name, tmp_path):
    path = tmp_path / "block.py"
    path.write_text(BLOCKS[name])
    runpy.run_path(str(path), run_name="__main__")
