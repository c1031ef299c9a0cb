"""The objective that docs/architecture.md shows is a plug-in that really trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.fixture
def plugin(tmp_path):
    """The page's example as an installed package with an entry point."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    home = tmp_path / "site"
    info = home / "example-1.0.dist-info"
    info.mkdir(parents=True)
    (home / "class_mean.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nearkin.objectives]\nclass-mean = class_mean\n")
    return home


def nearkin(home, *words):
    program = f"import sys; sys.path.insert(0, {str(home)!r}); from nearkin.cli import run; sys.exit(run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_example_trains_and_evaluates(plugin, tmp_path):
    run = tmp_path / "run"
    done = nearkin(
        plugin,
        *[
            "train",
            "digits",
            "--objective",
            "class-mean",
            "--objective.weight",
            "0.3",
            "--epochs",
            "1",
        ],
        *[
            "--images-per-class",
            "40",
            "--threads",
            "1",
            "--model",
            "test_resnet",
            "--out",
            str(run),
            "--json",
        ],
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["test_top1"] <= 1
    assert "weight: 0.3" in (run / "config.yaml").read_text()
    terms = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("pull" in record for record in terms if record["kind"] == "train")
    done = nearkin(plugin, "evaluate", str(run), "--json")
    assert json.loads(done.stdout)["split"] == "test", done.stderr


def test_without_the_package_its_name_is_unknown(tmp_path):
    done = nearkin(
        tmp_path, "train", "digits", "--objective", "class-mean", "--out", str(tmp_path / "run")
    )
    assert done.returncode == 2
    assert "Unknown objective class-mean" in done.stderr
    assert not (tmp_path / "run").exists()
