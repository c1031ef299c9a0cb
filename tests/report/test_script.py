"""The types of the script. NEARKIN_TSC names bin/tsc of TypeScript (npm package typescript)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # the stage of .ci/run that has the compiler


def checked(config):
    compiler, node = os.environ.get("NEARKIN_TSC"), shutil.which("node")
    if not compiler or node is None:
        pytest.skip("NEARKIN_TSC names no TypeScript compiler")
    done = subprocess.run(
        [node, compiler, "-p", config], capture_output=True, text=True, check=False
    )
    return done.stdout


def test_the_types_are_right():
    assert checked(ROOT / "tsconfig.json") == ""


def test_a_wrong_type_would_be_found(tmp_path):
    config = json.loads((ROOT / "tsconfig.json").read_text())
    script = (ROOT / config["files"][0]).read_text("utf-8")
    wrong = script.replace("Number(place)", "place.nothing", 1)
    assert wrong != script
    (tmp_path / "report.js").write_text(wrong, "utf-8")
    (tmp_path / "tsconfig.json").write_text(json.dumps(config | {"files": ["report.js"]}))
    assert "nothing" in checked(tmp_path / "tsconfig.json")
