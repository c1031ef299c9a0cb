"""The standard streams may be closed, full, ascii or cp1252: UTF-8 out, one sentence, the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.pictures import write_classes

CLASSES = ("狗", "猫")
FAST = "--epochs 1 --model test_resnet --image-size 16 --threads 1 --workers 0 --batch-size 8 --objective ce".split()


def nearkin(*words, redirect="", env=None, cwd=None):
    """`nearkin WORDS REDIRECT` in a shell; the streams that are not redirected come back."""
    command = ["sh", "-c", f'exec "$0" -m nearkin "$@" {redirect}', sys.executable, *words]
    return subprocess.run(
        command, env=os.environ | (env or {}), cwd=cwd, capture_output=True, timeout=240
    )


def one_sentence(done, start):
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"nearkin: {start}")
    return lines[0]


def test_a_full_stdout_is_reported():
    done = nearkin("list", "recipes", redirect=">/dev/full")
    assert "could not be written to stdout: No space left" in one_sentence(done, "stopped: ")
    assert done.returncode == 75
    assert nearkin("--help", redirect=">/dev/full").returncode == 75


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&-", "2>/dev/full", ""])
def test_other_streams_change_nothing(redirect):
    done = nearkin("list", "recipes", redirect=redirect)
    assert done.returncode == 0
    assert done.stderr == b""
    closed = redirect.startswith((">&-", "<&- >&-"))
    assert (b"digits-cone" in done.stdout) != closed


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", ">&-", ">/dev/full"])
def test_errors_keep_their_exit_code(redirect):
    done = nearkin("train", "--zzz", redirect=redirect)
    assert done.returncode == 2
    assert done.stdout == b""
    if redirect.startswith(">"):  # stderr is as it was
        one_sentence(done, "error: Unknown option --zzz.")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_the_output_is_utf8_in_every_locale(encoding, buffered):
    env = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": buffered}
    done = nearkin("list", "模型", env=env)
    assert done.returncode == 2
    done = nearkin("train", "--模型", env=env)
    assert "Unknown option --模型." in one_sentence(done, "error: ")


def test_a_reader_that_leaves_is_no_error():
    command = f'"{sys.executable}" -m nearkin list recipes | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert done.stderr == b""


PROGRAM = """
import os, sys
from nearkin.cli.streams import prepare_streams
prepare_streams()
file = os.open(os.devnull, os.O_WRONLY)
assert file > 2, file
assert all(os.get_inheritable(number) for number in (0, 1, 2))
print("to nobody", file=sys.stderr)
"""


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(redirect):
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, PROGRAM]
    assert subprocess.run(command, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    place = tmp_path_factory.mktemp("streams")
    write_classes(place / "photos", classes=CLASSES)
    done = nearkin("train", "photos", "--out", "run", "--json", *FAST, redirect="2>&-", cwd=place)
    assert done.returncode == 0
    return place, done


@pytest.mark.slow
def test_json_is_all_that_reaches_stdout(home):
    _, done = home
    (line,) = done.stdout.decode().splitlines()
    assert json.loads(line)["run"] == "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirect", "code"), [(">/dev/full 2>/dev/full", 75), (">/dev/full", 75), (">&- 2>&-", 0)]
)
def test_a_run_is_complete_whatever_becomes_of_its_output(home, redirect, code, tmp_path):
    place, _ = home
    out = tmp_path / "run"
    done = nearkin("train", "photos", "--out", str(out), *FAST, redirect=redirect, cwd=place)
    assert done.returncode == code
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_verb_writes_the_names_of_classes(home, encoding):
    place, _ = home
    env = {"PYTHONIOENCODING": encoding}
    write_classes(place / "fresh", classes=("鸟", "鱼"))
    fewshot = "fewshot run fresh --ways 2 --queries 2 --episodes 2".split()
    for words in (["evaluate", "run"], ["predict", "run", "photos"], fewshot):
        done = nearkin(*words, env=env, cwd=place)
        assert done.returncode == 0, done.stderr
        assert "bug" not in done.stderr.decode()
        assert any(name in done.stdout.decode() for name in (*CLASSES, "±"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [["evaluate", "run"], ["predict", "run", "photos"]])
def test_every_verb_reports_a_full_stdout(home, words):
    place, _ = home
    done = nearkin(*words, redirect=">/dev/full", cwd=place)
    assert done.returncode == 75
    one_sentence(done, "stopped: The result could not be written")
