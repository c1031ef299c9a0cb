"""What a run folder says about how the run was made."""

from __future__ import annotations

import sys

import pytest

from nearkin.training.run_folder import create, environment


@pytest.mark.parametrize("program", ["/bin/nearkin", "/lib/nearkin/__main__.py"])
def test_the_command_is_one_to_type(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "train", "photos"])
    assert environment()["command"] == "nearkin train photos"


@pytest.mark.parametrize("data", [".", "..", "../photos", "./", "cats/../", "{here}"])
def test_a_run_is_named_after_the_folder(tmp_path, monkeypatch, data):
    here = tmp_path / "photos"
    (here / "cats").mkdir(parents=True)
    monkeypatch.chdir(here / "cats" if data == ".." else here)
    made = create(None, data=data.format(here=here), objective="auto")
    assert made.name.startswith("photos-20")
