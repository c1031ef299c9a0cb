"""nearkin.predict: one path or many, every image in a folder, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pictures import write_image

import nearkin
from nearkin.cli import run as command
from nearkin.config import EpisodeOptions
from nearkin.errors import ConfigError, DataError, ModelError
from nearkin.evaluation.fewshot import EpisodeKeywords


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits after no step at all."""
    out = tmp_path_factory.mktemp("predict") / "run"
    options = {"epochs": 0, "model": "test_resnet", "threads": 1, "out": out}
    return nearkin.train("digits", "ce", **options).run


@pytest.fixture
def photos(tmp_path):
    """A folder as a camera, a browser and three systems leave it: 4 images and much else."""
    root = tmp_path / "photos"
    for name in ("1.jpg", "deep/2.png", "deep/deeper/3.bmp"):
        write_image(root / name, 1, size=(8, 8), mode="L")
    shutil.copy(root / "1.jpg", root / "4.JPG")
    hidden = (".ipynb_checkpoints/5.jpg", "__MACOSX/6.jpg", "@eaDir/7.jpg", ".8.jpg")
    for name in hidden:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "1.jpg", root / name)
    (root / "9.jpg").mkdir()  # a folder with the name of a file
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_is_searched_with_the_rules_of_train(digits, photos, capsys):
    found = [Path(one.path).relative_to(photos) for one in nearkin.predict(digits, photos)]
    names = ["1.jpg", "4.JPG", "deep/2.png", "deep/deeper/3.bmp"]
    assert list(map(str, found)) == names
    assert command(["predict", str(digits), str(photos), "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["predictions"]
    assert [row["path"] for row in rows] == [str(photos / name) for name in names]
    notes = [line for line in shown.err.splitlines() if line.startswith("note: ")]
    assert any("4 hidden" in note and str(photos) in note for note in notes)
    assert any("ignored" in note and "hidden" not in note for note in notes), "notes.txt"


def test_a_file_that_is_named_gets_a_row_whatever_its_name(digits, photos, capsys):
    files = [photos / "notes.txt", photos / ".8.jpg"]
    text, image = nearkin.predict(digits, files)
    assert text.error
    assert (text.label, text.probability, text.top5) == (None, None, ())
    assert image.label in map(str, range(10))
    assert image.error is None
    assert command(["predict", str(digits), *map(str, files)]) == 3
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert "1 of 2 files" in shown.err


@pytest.mark.parametrize("kind", [str, Path, lambda path: [path], lambda path: iter([str(path)])])
def test_one_path_or_many(digits, photos, kind):
    (one,) = nearkin.predict(digits, kind(photos / "1.jpg"))
    assert one.path == str(photos / "1.jpg")
    assert one.top5[0] == (one.label, one.probability)
    assert len(one.top5) == 5
    assert isinstance(one, nearkin.Prediction)
    assert one.to_dict()["class"] == one.label
    with pytest.raises(AttributeError, match="cannot assign"):
        one.label = "other"


def test_errors_come_before_the_first_prediction(digits, photos, tmp_path):
    with pytest.raises(DataError, match=r"nothing.jpg does not exist"):
        nearkin.predict(digits, tmp_path / "nothing.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        nearkin.predict(digits, tmp_path / "empty")
    with pytest.raises(ConfigError, match="--tta tencorp .*Did you mean tencrop"):
        nearkin.predict(digits, photos, tta="tencorp")
    with pytest.raises(ConfigError, match="--device gpu is none of auto, cpu"):
        nearkin.predict(digits, photos, device="gpu")
    with pytest.raises(ModelError, match="photos is no run folder"):
        nearkin.predict(photos, photos)


LIGHT = """
import sys
from nearkin.cli import run
code = run(sys.argv[1:])
heavy = [name for name in ("torch", "timm", "PIL") if name in sys.modules]
print(code, *heavy)
"""


def fresh(*argv):
    """The exit code, the heavy modules that were imported, and stderr, in a process of its own."""
    words = [sys.executable, "-c", LIGHT, *map(str, argv)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    code, *heavy = done.stdout.splitlines()[-1].split()
    return int(code), heavy, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("evaluate nowhere", 4, "The run nowhere does not exist"),
        ("evaluate photos", 4, "photos is no run folder"),
        ("evaluate half", 4, "let its training end first"),
        ("evaluate run --tta five", 2, "--tta five is none of none, flip, tencrop"),
        ("evaluate run --weights best", 2, "--weights best is none of equal, validation"),
        ("evaluate run --device gpu", 2, "--device gpu"),
        ("evaluate run --workers x", 2, "--workers"),
        ("predict nowhere photos", 4, "The run nowhere does not exist"),
        ("predict file photos", 4, "is a file, not a run folder"),
        ("predict run photos --tta five", 2, "--tta five"),
        (
            "predict run photos --sets 2",
            2,
            "--sets 2 is not between 0 and 1; give a share such as 0.95",
        ),
        ("fewshot nowhere photos", 4, "The run nowhere does not exist"),
        ("fewshot run photos --ways 1", 2, "--ways"),
        ("evaluate run nowhere", 3, "The data 'nowhere' are missing"),
        ("fewshot run nowhere", 3, "The data 'nowhere' are missing"),
        ("predict run nowhere", 3, "nowhere does not exist"),
        ("import-cone nowhere.pth", 4, "nowhere.pth"),
    ],
)
def test_bad_words_are_refused_without_torch(tmp_path, monkeypatch, words, code, text):
    monkeypatch.chdir(tmp_path)
    for name, file in (("run", "model.json"), ("half", "config.yaml"), ("photos", "a.jpg")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "file").write_text("")
    found, heavy, err = fresh(*words.split())
    assert (found, heavy) == (code, []), err
    assert text in err


def test_the_typed_options_of_fewshot_are_all_options():
    assert EpisodeKeywords.__annotations__.keys() == EpisodeOptions.model_fields.keys()


def test_a_name_that_is_not_utf8_is_written_as_its_bytes(digits, photos):
    name = os.path.join(os.fsencode(photos), b"caf\xe9 \xe5\xad\x97.jpg")
    shutil.copy(os.fsencode(photos / "1.jpg"), name)
    words = [sys.executable, "-m", "nearkin", "predict", str(digits), name]
    done = subprocess.run(
        words, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.stdout.splitlines()[1].startswith(name + b",")
