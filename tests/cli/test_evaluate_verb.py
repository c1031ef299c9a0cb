"""nearkin evaluate: which word is what, and what a person gets to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nearkin.cli import run as command
from nearkin.cli.evaluate import _runs_and_data
from nearkin.errors import ConfigError


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """a and b are runs, half one that has not ended, photos holds none."""
    monkeypatch.chdir(tmp_path)
    for name, file in (("a", "model.json"), ("b", "model.json"), ("half", "status.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "half" / "config.yaml").write_text("{}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.yaml").write_text("{}")  # of another program


@pytest.mark.parametrize(
    ("words", "runs", "data"),
    [
        ("a", "a", None),
        ("photos", "photos", None),  # and then the model is missed
        ("a photos", "a", "photos"),
        ("a digits", "a", "digits"),
        ("a b", "a b", None),  # a run folder is a RUN in the last place, too
        ("a b photos", "a b", "photos"),
        ("photos a", "a", "photos"),
        ("a half", "a half", None),
        ("photos digits", "photos", None),
    ],
)
def test_which_word_is_what(folders, words, runs, data):
    assert _runs_and_data(words.split()) == (runs.split(), data)


def test_two_words_that_could_be_data(folders):
    with pytest.raises(ConfigError, match="photos and digits are no run folders"):
        _runs_and_data(["a", "photos", "digits"])
    with pytest.raises(ConfigError, match="Give the folder"):
        _runs_and_data([])


def test_a_run_that_has_not_ended_is_told_so(folders, capsys):
    assert command(["evaluate", "half"]) == 4
    said = capsys.readouterr().err
    assert "let its training end first" in said
    assert "nearkin train --resume half" in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two models of digits after no step at all."""
    home = tmp_path_factory.mktemp("verb")
    common = ["--epochs", "0", "--model", "test_resnet", "--threads", "1", "--quiet"]
    for name, seed in (("a", "0"), ("b", "1")):
        words = ["train", "digits", *common, "--objective", "ce", "--seed", seed]
        assert command([*words, "--out", str(home / name)]) == 0
    return home


def test_what_a_person_reads(runs, capsys):
    one, two = str(runs / "a"), str(runs / "b")
    assert command(["evaluate", one]) == 0
    said = capsys.readouterr().out
    assert "were kept" not in said
    files = said.splitlines()[-1].removeprefix("in full: ").split(", ")
    assert files == [f"{one}/classes-test.csv", f"{one}/confusion-test.csv"]
    assert all(Path(file).is_file() for file in files)
    assert command(["evaluate", one]) == 0
    assert "its predictions were kept" in capsys.readouterr().out
    assert command(["evaluate", one, "--no-cache"]) == 0
    assert "were kept" not in capsys.readouterr().out
    assert command(["evaluate", one, two]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith(one)]
    (second,) = [line for line in lines if line.startswith(two)]
    assert "were kept" in first
    assert "were kept" not in second
    assert "0.500" in first
    assert "0.500" in second
    assert any(line.startswith("top-1") for line in lines)


def test_what_a_program_reads(runs, capsys):
    words = ["evaluate", str(runs / "a"), str(runs / "b"), "digits", "--tta", "flip", "--json"]
    assert command(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tta"], found["weights"], found["split"]) == ("flip", "equal", "test")
    assert found["test_top1"] == found["top1"]
    assert [set(member) for member in found["members"]] == 2 * [{"run", "weight", "top1", "cached"}]


def test_the_notes_are_told_on_stderr(runs, capsys):
    cache = runs / "a" / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("in the way")
    assert command(["evaluate", str(runs / "a"), "--json"]) == 0
    seen = capsys.readouterr()
    assert "note: " in seen.err
    assert "kept" in seen.err
    assert json.loads(seen.out)["n"] == 360
    cache.unlink()


def test_predict_takes_views_too(runs, capsys, tmp_path):
    from tests.pictures import write_image

    picture = str(write_image(tmp_path / "p.png", size=(8, 8), mode="L"))
    found = {}
    for tta in ("none", "tencrop"):
        assert command(["predict", str(runs / "a"), picture, "--tta", tta, "--json"]) == 0
        found[tta] = json.loads(capsys.readouterr().out)["predictions"][0]["probability"]
    assert found["none"] != found["tencrop"]
    assert command(["predict", str(runs / "a"), picture, "--tta", "five"]) == 2
    assert "none, flip, tencrop" in capsys.readouterr().err
