"""The report of real runs: at the end of a training, afterwards, and of several runs."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image

import nearkin
from nearkin.cli import run as command
from nearkin.errors import ModelError
from nearkin.evaluation import report_data
from nearkin.training import trainer
from nearkin.training.report import last_run, report, report_several

COMMON = {"model": "test_resnet", "threads": 1, "images_per_class": 10, "batch_size": 20}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        nearkin.train(
            "digits", "cone", epochs=1, seed=seed, split_seed=0, out=folder / name, **COMMON
        )
    return folder


def embedded(page):
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_a_training_ends_with_its_report(runs):
    page = runs / "first" / "report.html"
    values = embedded(page)
    assert values["evaluated"] == 360
    assert values["classes"] == [str(k) for k in range(10)]
    assert sum(cell >= 0 for cell in values["cell"]) == len(values["base"]) == 460
    assert page.stat().st_size < 600_000


def test_the_same_report_can_be_written_again(runs, tmp_path):
    page = report(runs / "first", out=tmp_path / "again.html")
    first, again = embedded(runs / "first" / "report.html"), embedded(page)
    for name in ("base", "label", "predicted", "cell", "withKin", "kin"):
        assert again[name] == first[name]
    assert again["probability"] == pytest.approx(first["probability"], abs=1)


def test_of_a_large_split_some_images_are_seen_in_a_second_pass(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report_data, "MOST_SEEN", 300)
    monkeypatch.setattr(report_data, "MOST_IMAGES", 100)
    page = report(runs / "first", out=tmp_path / "page.html")
    assert embedded(page)["evaluated"] == 100
    assert "360 images of 10 classes" in page.read_text("utf-8")


def test_the_last_run_on_the_same_images_is_compared(runs):
    assert last_run(runs / "first") is None
    shutil.copytree(runs / "first", runs / "third")
    status = json.loads((runs / "third" / "status.json").read_text())
    (runs / "third" / "status.json").write_text(json.dumps(status | {"updated": "2999"}))
    found = last_run(runs / "third")
    assert found.run == str(runs / "first")
    assert len(found.right) == 360
    (runs / "first" / "predictions.csv").rename(runs / "kept.csv")
    assert last_run(runs / "third") is None
    (runs / "kept.csv").rename(runs / "first" / "predictions.csv")
    shutil.rmtree(runs / "third")


def test_it_can_be_left_out(tmp_path):
    nearkin.train("digits", "ce", epochs=0, out=tmp_path / "run", report=False, **COMMON)
    assert not (tmp_path / "run" / "report.html").exists()


def test_without_a_split_to_evaluate_there_is_none(tmp_path, capsys):
    for k, name in enumerate(("a", "b")):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (99 * k, number, 0)).save(
                tmp_path / "data" / "train" / name / f"{number}.png"
            )
    options = COMMON | {"images_per_class": None, "batch_size": 4, "image_size": 16}
    nearkin.train(
        tmp_path / "data", "ce", val_split=0, epochs=1, out=tmp_path / "run", quiet=False, **options
    )
    assert "no report: there is neither" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no room\nfor more")

    monkeypatch.setattr(trainer, "write_report", fail)
    result = nearkin.train("digits", "ce", epochs=0, out=tmp_path / "run", quiet=False, **COMMON)
    assert result.metrics["n"] == 360
    text = " ".join(capsys.readouterr().err.split())
    assert "there is no report: no room; try nearkin report" in text
    assert "for more" not in text


def test_the_command_says_where_the_page_is(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert command(["report", str(runs / "first"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(out)
    assert out.is_file()


def test_several_runs_are_compared(runs, capsys):
    assert command(["report", str(runs / "first"), str(runs / "second")]) == 0
    page = runs / "first" / "runs.html"
    assert capsys.readouterr().out == f"page {page}\n"
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert f"2 runs in {runs}, compared with first" in text
    assert "second is" in text
    assert "<code>seed</code>" in text  # an option that differs
    assert "<code>epochs</code>" not in text


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("", 2, "Report on which run?"),
        ("nowhere", 4, "nowhere does not exist"),
        ("first second --data x", 2, "--data is for one RUN"),
        ("first --data nowhere", 3, "nowhere"),
        ("first --device tpu", 2, "--device tpu"),
        ("first --outt x", 2, "Did you mean --out?"),
        ("first --out second", 2, "--out second is a folder"),
        ("first --out /dev/null", 2, "--out /dev/null is no regular file"),
        (
            "first --out nowhere/page.html",
            2,
            "The folder of --out nowhere/page.html does not exist",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(runs, monkeypatch, capsys, words, code, text):
    monkeypatch.chdir(runs)
    assert command(["report", *words.split()]) == code
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_damaged_files_of_a_run(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "first", run)
    (run / "environment.json").write_text("[" * 5000)
    (run / "identity.json").write_text("{}")
    (run / "predictions.csv").write_bytes(b"\xff\x00")
    assert report(run).is_file()  # the page can do without these
    assert report_several([run, runs / "second"]).is_file()
    (run / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ModelError, match="line 1"):
        report(run)
    (run / "kin.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"kin\.safetensors"):
        report(run)
