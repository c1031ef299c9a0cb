"""What can be known without torch is said without it: held by what is imported, not by time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tests.pictures import write_classes

HEAVY = ("torch", "timm", "torchvision", "sklearn", "scipy")
# name: (exit code, words of the message, command line)
CASES = {
    "unknown verb": (2, "Did you mean train?", "trian"),
    "unknown option": (2, "--bach-size. Did you mean --batch-size?", "train --bach-size 3"),
    "option of another tool": (2, "nearkin calls it --lr", "train --learning-rate 1"),
    "too many words": (2, "The word b is one too many", "train a b"),
    "value that is no number": (2, "--epochs 'x' is not valid", "train --epochs x"),
    "unknown value": (2, "Did you mean adamw?", "train --optimizer adam"),
    "unknown logger": (2, "Did you mean tensorboard?", "train --log tensorbord"),
    "unknown objective": (2, "Did you mean cone?", "train --objective kone"),
    "help of an unknown objective": (2, "Did you mean cone?", "train --objective kone --help"),
    "unknown option of an objective": (
        2,
        "Did you mean --objective.topk?",
        "train --objective cone --objective.topc 1",
    ),
    "option of no named objective": (2, "--objective cone", "train --objective.topk 1"),
    "unknown recipe": (2, "Did you mean digits-cone?", "train --config digits-con"),
    "missing folder": (3, "nowhere", "train nowhere/"),
    "missing table": (3, "nowhere.csv", "train nowhere.csv"),
    "misspelt data set": (3, "Did you mean digits?", "train digts"),
    "empty folder": (3, "empty", "train empty"),
    "empty table": (3, "names no images", "train empty.csv"),
    "not a table": (3, "notes.txt", "train notes.txt"),
    "address": (3, "https://a.b/c", "train https://a.b/c"),
    "missing data, as YAML shows it": (3, "nowhere", "train nowhere --print-config"),
    "run folder that exists": (2, "The run folder photos exists", "train photos --out photos"),
    "resume of nothing": (4, "The run nowhere does not exist", "train --resume nowhere"),
    "resume of no run": (4, "photos is no run folder", "train --resume photos"),
    "evaluate nothing": (2, "Evaluate which run?", "evaluate"),
    "evaluate a missing run": (4, "The run nowhere does not exist", "evaluate nowhere"),
    "evaluate no run": (4, "model.json", "evaluate photos"),
    "evaluate, unknown option": (2, "nearkin calls it --workers", "evaluate x --num-workers 2"),
    "predict nothing": (2, "Predict what?", "predict run"),
    "predict with a missing run": (4, "The run nowhere does not exist", "predict nowhere photos"),
    "predict with no run": (4, "model.json", "predict photos photos"),
    "predict, share out of range": (
        2,
        "--reject 1 is not between",
        "predict done photos --reject 1",
    ),
    "predict, no share": (2, "--sets takes a number, not x", "predict done photos --sets x"),
    "predict, unknown format": (2, "Did you mean json", "predict done photos --format jsom"),
    "predict, file without format": (2, "says no format", "predict done photos --out a.png"),
    "predict, kin missing": (4, "--sets needs kin.safetensors", "predict done photos --sets 0.9"),
    "predict, sheets among others": (2, "holds other files", "predict kin photos --explain photos"),
    "predict a pattern": (3, "matches no image", "predict done photos/*.tif"),
    "embed nothing": (2, "Embed what?", "embed done"),
    "embed to nowhere": (2, "Embed where?", "embed done photos"),
    "embed with a missing run": (4, "The run nowhere does", "embed nowhere photos --out a.npz"),
    "embed a missing table": (3, "nowhere.csv", "embed done nowhere.csv --out a.npz"),
    "fewshot without data": (2, "images to draw from", "fewshot run"),
    "fewshot with a missing run": (4, "The run nowhere does not exist", "fewshot nowhere photos"),
    "evaluate on missing data": (3, "nowhere", "evaluate done nowhere"),
    "evaluate on an empty folder": (3, "empty", "evaluate done empty"),
    "predict a missing file": (3, "nowhere.jpg", "predict done nowhere.jpg"),
    "predict an empty folder": (3, "empty", "predict done empty"),
    "fewshot on missing data": (3, "nowhere", "fewshot done nowhere"),
    "import a missing file": (4, "nowhere.pth", "import-cone nowhere.pth"),
    "import nothing": (2, "Import which file?", "import-cone"),
    "compare nothing": (2, "nothing to compare ce with", "compare photos --objectives ce"),
    "compare an unknown objective": (2, "Did you mean cone?", "compare --objectives ce,kone"),
    "compare, unknown rival": (2, "ce+ls (label smoothing)", "compare --objectives ce+sl"),
    "compare, unknown option": (2, "Did you mean weight?", "compare --objectives supcon:weigth=1"),
    "compare what is not fair": (2, "is the same for all", "compare --objectives ce:epochs=3"),
    "compare with an objective": (2, "give --objectives", "compare --objective.weight 1"),
    "compare, minutes missing": (2, "needs --minutes", "compare --budget minutes"),
    "compare on missing data": (3, "nowhere", "compare nowhere"),
    "compare in a folder of others": (2, "exists", "compare photos --out photos"),
    "list nothing": (2, "One of models, objectives, recipes", "list"),
    "list an unknown kind": (2, "Did you mean recipes?", "list recipe"),
    "list objectives": (0, "", "list objectives"),
    "list recipes": (0, "", "list recipes"),
    "version": (0, "", "--version"),
    **{f"help of {verb}": (0, "", f"{verb} --help") for verb in ("train", "evaluate", "predict")},
    **{
        f"help of {verb}": (0, "", f"{verb} --help")
        for verb in ("fewshot", "import-cone", "list", "compare", "embed")
    },
}
PROGRAM = """
import contextlib, io, json, sys
from nearkin.cli import run

heavy, results = json.loads(sys.argv[1]), {}
for name, words in json.loads(sys.argv[2]).items():
    before = set(sys.modules)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        code = run(words)
    loaded = [module for module in heavy if module in sys.modules and module not in before]
    results[name] = [code, err.getvalue(), out.getvalue(), loaded]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All command lines of CASES in one process: exit code, stderr, stdout, heavy modules that each one loaded."""
    home = tmp_path_factory.mktemp("home")
    write_classes(home / "photos")
    (home / "empty").mkdir()
    (home / "done").mkdir()
    (home / "kin").mkdir()
    for name in ("model.json", "kin.safetensors"):
        (home / "kin" / name).write_text("not read before the folder of sheets is known to be free")
    for name in ("model.json", "config.yaml"):
        (home / "done" / name).write_text("not read before the data is known to exist")
    (home / "empty.csv").write_text("path,label\n")
    (home / "notes.txt").write_text("notes")
    words = {name: line.split() for name, (_, _, line) in CASES.items()}
    command = [sys.executable, "-c", PROGRAM, json.dumps(HEAVY), json.dumps(words)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_the_answer_needs_no_torch(name, results):
    expected, words, _ = CASES[name]
    code, err, out, loaded = results[name]
    assert code == expected, err
    if code:
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("nearkin: error: ")
        assert words in err
    else:
        assert err == ""
        assert out
    assert loaded == []
