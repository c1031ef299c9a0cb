"""What a run says while it trains: lines without a terminal, and what a duration is in words."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nearkin.training import console
from nearkin.training.console import Bar, duration


class Log:
    """In place of the journal."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


DOCS = Path(__file__).parents[2] / "docs"
PICTURES = sorted(["terminal.svg", *(path.name for path in DOCS.glob("tutorial-*.svg"))])


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_a_terminal_holds_no_address(name):
    picture = (DOCS / name).read_text()
    assert re.findall(r"https?://[^\s\"]*", picture) == ["http://www.w3.org/2000/svg"]
    assert not re.search("/(root|home|tmp|work)", picture)


def test_the_picture_of_a_training_is_of_this_bar():
    picture = (DOCS / "terminal.svg").read_text().replace("&#160;", " ")
    assert "images/s" in picture
    assert re.search(r"loss \d\.\d{4} \(ce \d\.\d{4}, supcon \d\.\d{4}\)  val top-1", picture)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (40, "40 s"),
        (60, "1 min"),
        (12.4 * 60, "12 min"),
        (59.4 * 60, "59 min"),
        (3 * 3600 + 5 * 60, "3 h 5 min"),
        (48 * 3600, "48 h 0 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def train(loss):
    return {"kind": "train", "loss": loss}


def validation(value, epoch=0, stage="joint", best=True):
    record = {"kind": "validation", "metric": "val top-1", "value": value, "best": best}
    return record | {"epoch": epoch, "stage": stage}


def test_a_validation_is_a_line_with_rate_best_and_remaining_time(clock, capsys):
    with Bar(40, 32, Log(), quiet=False, silent=False) as bar:
        bar.update(0, validation(0.25, stage="probe"))
        assert capsys.readouterr().err == "", "the probe has a sentence of its own"
        clock[0] += 10.0
        bar.update(10, train(1.23456))
        assert capsys.readouterr().err == ""
        clock[0] += 10.0
        bar.update(20, validation(0.5))
        clock[0] += 40.0
        bar.update(30, validation(0.475, 1, best=False))
        clock[0] += 20.0
        bar.update(40, validation(0.6, 2))
    assert capsys.readouterr().err.splitlines() == [
        "joint epoch 1  step 20/40  loss 1.2346  val top-1 50.00 % (best 50.00 %)  32 images/s  20 s left",
        "joint epoch 2  step 30/40  loss 1.2346  val top-1 47.50 % (best 50.00 %)  16 images/s  20 s left",
        "joint epoch 3  step 40/40  loss 1.2346  val top-1 60.00 % (best 60.00 %)  16 images/s",
    ]


def test_the_rate_of_a_continued_run_counts_its_own_steps(clock, capsys):
    with Bar(40, 32, Log(), quiet=False, silent=False) as bar:
        bar.update(30, train(1.0))
        clock[0] += 5.0
        bar.update(35, validation(0.5))
    assert "  32 images/s  5 s left\n" in capsys.readouterr().err


def test_a_continued_run_knows_the_best_value_before(clock, capsys):
    with Bar(40, 32, Log(), quiet=False, silent=False) as bar:
        bar.best = 0.75
        bar.update(20, validation(0.5, best=False))
    assert "val top-1 50.00 % (best 75.00 %)" in capsys.readouterr().err


def test_a_first_record_has_no_rate(clock, capsys):
    with Bar(40, 32, Log(), quiet=False, silent=False) as bar:
        bar.update(10, validation(0.5))
    expected = "joint epoch 1  step 10/40  val top-1 50.00 % (best 50.00 %)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("quiet", "silent", "expected"),
    [
        (False, False, ["said", "warning: warned"]),
        (True, False, ["warning: warned"]),
        (True, True, []),
    ],
)
def test_what_is_shown_is_in_the_log_as_well(quiet, silent, expected, capsys):
    log = Log()
    with Bar(40, 32, log, quiet=quiet, silent=silent) as bar:
        bar.say("said")
        bar.warn("warned")
        bar.update(10, validation(0.5))
    shown = capsys.readouterr().err.splitlines()
    assert shown[: len(expected)] == expected
    assert len(shown) == len(expected) + (not quiet)
    assert log.lines == ["said", "warning: warned"]


def test_a_terminal_shows_the_same_beside_its_bar(clock, monkeypatch):
    shown = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Bar(40, 32, Log(), quiet=False, silent=False) as bar:
        monkeypatch.setattr(bar._progress, "update", lambda _, **values: shown.append(values))
        bar.update(0, validation(0.25, stage="probe"))
        clock[0] += 10.0
        bar.update(20, train(1.5))
    assert shown == [
        {"completed": 0, "rate": "", "loss": "", "value": "val top-1 25.00 % (best 25.00 %)"},
        {
            "completed": 20,
            "rate": "64 images/s",
            "loss": "loss 1.5000",
            "value": "val top-1 25.00 % (best 25.00 %)",
        },
    ]


def test_without_a_terminal_a_line_comes_every_10_seconds(clock, capsys):
    with Bar(400, 32, Log(), quiet=False, silent=False) as bar:
        for step in range(1, 201):
            if step == 60:
                bar.update(step, train(1.23456) | {"lr": 0.1, "ce": 0.8, "supcon": 0.86913})
            bar.tick(step, "joint", step // 100)
            clock[0] += 0.125
    assert capsys.readouterr().err.splitlines() == [
        "joint epoch 1  step 81/400  loss 1.2346 (ce 0.8000, supcon 0.8691)  256 images/s  40 s left",
        "joint epoch 2  step 161/400  loss 1.2346 (ce 0.8000, supcon 0.8691)  256 images/s  30 s left",
    ]


def test_a_line_of_an_epoch_puts_the_next_one_off(clock, capsys):
    with Bar(400, 32, Log(), quiet=False, silent=False) as bar:
        for step in range(1, 100):
            bar.tick(step, "joint", 0)
            clock[0] += 0.125
            if step == 78:
                bar.update(step, validation(0.5))
    assert [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()] == ["step 78/400"]


@pytest.mark.parametrize("silent", [False, True])
def test_quiet_runs_have_no_lines(clock, capsys, silent):
    with Bar(40, 32, Log(), quiet=True, silent=silent) as bar:
        for step in range(1, 40):
            bar.tick(step, "joint", 0)
            clock[0] += 11.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"ce": 0.5}, "loss 0.5000"),
        ({"ce": 0.25, "kin": 0.125}, "loss 0.5000 (ce 0.2500, kin 0.1250)"),
    ],
)
def test_terms_are_shown_where_there_are_several(terms, words):
    assert console.loss_words({"kind": "train", "lr": 0.1, "loss": 0.5, **terms}) == words


@pytest.mark.parametrize("width", [60, 120])
def test_the_bar_has_two_lines(width):
    screen = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    bar = console.live(screen)
    loss, value = "loss 1.2 (ce 0.8, supcon 0.9)", "val top-1 50.00 % (best 60.00 %)"
    bar.add_task("train", total=400, completed=100, rate="64 images/s", loss=loss, value=value)
    screen.print(bar.get_renderable())
    first, second, *rest = screen.export_text().splitlines()
    assert rest == []
    assert first.startswith("training ")
    assert " 100/400 " in first
    assert first.endswith("64 images/s")
    assert second == (f"{loss}  {value}" if width == 120 else f"{loss}  {value}"[:59] + "…")


def test_the_bar_of_a_continued_run_begins_where_the_run_goes_on(clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Bar(400, 32, Log(), quiet=False, silent=False) as bar:
        bar.tick(301, "joint", 0)
        clock[0] += 10.0
        bar.tick(311, "joint", 0)
        (task,) = bar._progress.tasks
        assert task.completed == 311
        counted = [sample.completed for sample in task._progress]  # what rich takes the speed from
        assert counted == [10], "steps of the earlier process are no speed"
