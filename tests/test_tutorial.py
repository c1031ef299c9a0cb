"""The commands of docs/photos.md, as they stand, on generated photos."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from tests.processes import finish, start
from tests.training.test_photos import write_photo

from nearkin.cli import run as command

PAGE = Path(__file__).parents[1] / "docs" / "photos.md"
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for line in block.splitlines()
    if line.startswith("nearkin ")
]


def run_in(folder, words):
    """In a process of its own, as a person would; the standard output goes where the command says."""
    import contextlib
    import os

    os.chdir(folder)
    if ">" not in words:
        return command(words)
    place = words.index(">")
    with Path(words[place + 1]).open("w") as file, contextlib.redirect_stdout(file):
        return command(words[:place])


def test_the_page_has_the_commands():
    verbs = [words[1] for words in COMMANDS]
    assert verbs == [
        *("doctor", "train", "train"),
        *("doctor", "train", "predict", "evaluate", "export"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)  # three trainings and an export
def test_the_tutorial(tmp_path):
    kinds = ("oak", "birch", "ash")
    for label, kind in enumerate(kinds):
        for number in range(10):
            write_photo(tmp_path / "photos" / kind / f"IMG_{number:04}.jpg", label, number)
        for number in range(10, 13):
            write_photo(tmp_path / "other" / kind / f"{number}.jpg", label, number)
            write_photo(tmp_path / "new" / f"{kind}{number}.jpg", label, number + 5)
    # As the report saves them: a photo that is to be left out.
    (tmp_path / "marks.csv").write_text(
        "path,label,split,mark\nbirch/IMG_0000.jpg,birch,train,leave out\n"
    )
    cache = {"NEARKIN_CACHE_DIR": str(tmp_path / "cache")}
    for words in COMMANDS:
        log = tmp_path / "log"
        # A quarter of an hour is too long for a test.
        less = ["--epochs", "1"] if words[1] == "train" and "--epochs" not in words else []
        code = finish(start(run_in, tmp_path, words[1:] + less, env=cache, log=log))
        assert code == [0], f"{words}: {log.read_text()}"
        if words[1] == "train":
            text = log.read_text()
            assert "top-1" in text
            assert f"next: nearkin predict {words[-1]} PHOTOS" in text
    kept = (tmp_path / "clean.csv").read_text()
    assert "birch/IMG_0001.jpg" in kept
    assert "birch/IMG_0000.jpg" not in kept
    assert (tmp_path / "better" / "report.html").is_file()
    assert (tmp_path / "clean" / "export-onnx" / "model.onnx").is_file()
    rows = list(csv.DictReader((tmp_path / "answers.csv").read_text().splitlines()))
    assert len(rows) == 9
    assert sum(row["path"].split("/")[-1].startswith(row["class"]) for row in rows) >= 6
