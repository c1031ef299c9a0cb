"""What a run folder says about how the run was made."""

from __future__ import annotations

import sys

import pytest

from nearkin.training.run_folder import environment


@pytest.mark.parametrize("program", ["/bin/nearkin", "/lib/nearkin/__main__.py"])
def test_the_command_is_one_to_type(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "train", "photos"])
    assert environment()["command"] == "nearkin train photos"
