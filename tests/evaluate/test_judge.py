"""Metrics are exact: odd sizes, more processes than images, nothing padded, nothing dropped."""

from __future__ import annotations

import json

import pytest
import torch
from tests.pictures import write_image
from tests.processes import finish, ranks, start

from nearkin.cli import run
from nearkin.errors import ModelError
from nearkin.evaluation.verbs import evaluate, predict


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model of digits after no step at all: 0 epochs give a run that can be used."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    words = [
        "train",
        "digits",
        "--epochs",
        "0",
        "--model",
        "test_resnet",
        "--threads",
        "1",
        "--quiet",
    ]
    assert run([*words, "--out", str(folder), "--objective.bank", "40"]) == 0
    return folder


def measured(folder, data, split, out):
    """What each process says; the first writes it down."""
    import os

    torch.set_num_threads(1)
    result = evaluate(folder, data, split=split)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(result))


def on(processes, folder, data, split, tmp_path):
    out, log = tmp_path / f"{processes}.json", tmp_path / "log"
    environments = ranks(processes) if processes > 1 else [{}]
    started = [start(measured, folder, data, split, out, env=env, log=log) for env in environments]
    assert set(finish(*started)) == {0}, log.read_text()
    return json.loads(out.read_text())


def test_any_number_of_processes_gives_the_same_metrics(untrained, tmp_path):
    one = on(1, untrained, None, "val", tmp_path)
    three = on(3, untrained, None, "val", tmp_path)
    assert one["n"] == three["n"] == 143
    assert one["confusion"] == three["confusion"]
    assert one["log_loss"] == pytest.approx(three["log_loss"], rel=1e-6)


def test_more_processes_than_images(untrained, tmp_path):
    for name in ("3", "7"):
        write_image(tmp_path / "few" / name / "a.png", int(name), size=(8, 8), mode="L")
    result = on(3, untrained, str(tmp_path / "few"), None, tmp_path)
    assert (result["n"], result["split"]) == (2, "test")


def test_predict_agrees_with_evaluate(untrained, tmp_path):
    files = [
        write_image(tmp_path / "few" / name / f"{n}.png", int(name), n, size=(11, 9), mode="L")
        for name in ("1", "2", "5")
        for n in range(3)
    ]
    result = evaluate(untrained, tmp_path / "few")
    guesses = list(predict(untrained, files))
    right = sum(guess.label == file.parent.name for guess, file in zip(guesses, files, strict=True))
    assert result["n"] == 9
    assert result["top1"] == pytest.approx(right / 9)
    again = next(predict(untrained, [files[4]]))
    assert again.probability == pytest.approx(guesses[4].probability, rel=1e-5)


def test_a_model_that_is_not_finished(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match="no finished model"):
        evaluate(tmp_path / "run")
