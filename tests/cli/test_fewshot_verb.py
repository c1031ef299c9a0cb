"""nearkin fewshot: what a person sees, which images are refused, and that the same words give the same numbers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from tests.pictures import write_classes, write_image

import nearkin
from nearkin.cli import run
from nearkin.data.dataset import load_dataset
from nearkin.errors import ConfigError, DataError, ModelError
from nearkin.evaluation import features

SMALL = {"ways": 2, "shots": 1, "queries": 2, "episodes": 20, "copies": 2}
WORDS = [f"--{name}={value}" for name, value in SMALL.items()]
QUICK = ["--epochs", "0", "--model", "test_resnet", "--image-size", "16", "--threads", "1"]


def trained(folder, data, *words):
    assert (
        run(["train", data, "--out", folder, *QUICK, "--quiet", "--batch-size", "4", *words]) == 0
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on a flat folder and one on a folder with a test split, and images of other classes."""
    root = tmp_path_factory.mktemp("fewshot")
    write_classes(root / "base", ("ant", "bee"), each=20)
    write_classes(root / "split" / "train", ("ant", "bee"), each=6)
    write_classes(root / "split" / "test", ("ant", "bee"), each=4)
    for label, (name, each) in enumerate({"cow": 5, "dog": 5, "elk": 5, "fox": 2}.items()):
        for number in range(each):  # noise: no class is easy
            write_image(root / "new" / name / f"{number}.png", 0, 100 * label + number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trained("flat", "base", "--val-split", "0.3")
        trained("splits", "split")
        trained("whole", "base", "--val-split", "0")
    return root


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def told(capsys, *argv):
    """The JSON on stdout and the text on stderr."""
    capsys.readouterr()
    assert run(["fewshot", *argv, *WORDS, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def refused(capsys, code, argv, *words):
    capsys.readouterr()
    assert run(["fewshot", *argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("nearkin: error: ")
    for word in words:
        assert word in last, last


def test_the_line_and_the_json_agree(here, capsys):
    assert run(["fewshot", "flat", "new", *WORDS]) == 0
    shown = capsys.readouterr()
    found, err = told(capsys, "flat", "new")
    assert err == shown.err == ""
    mean, interval = 100 * found["mean"], 100 * found["interval"]
    assert shown.out == (
        f"2-way 1-shot: {mean:.2f} ± {interval:.2f} % (20 episodes, 2 queries a class, 95 % interval; "
        "3 of 4 classes have 3 images)\n"
    )
    assert found["interval"] == pytest.approx(1.96 * found["std"] / 20**0.5)
    assert 0 < found["mean"] < 1
    expected = {
        "run": "flat",
        "data": "new",
        "split": "all",
        "classes": 4,
        "eligible": 3,
        "seed": 0,
    }
    expected |= SMALL | {"shared": [], "notes": [], "test_top1": None}
    assert expected.items() <= found.items()
    assert found.pop("episodes_per_second") > 0
    assert set(found) - set(expected) == {"mean", "std", "interval"}


def test_the_same_words_give_the_same_numbers(here, capsys):
    first, _ = told(capsys, "flat", "new")
    again, _ = told(capsys, "flat", "new", "--workers", "2")
    other, _ = told(capsys, "flat", "new", "--seed", "1")
    for found in (first, again, other):
        del found["episodes_per_second"]
    assert first == again
    assert (first["mean"], first["std"]) != (other["mean"], other["std"])


def test_from_python(here):
    found = nearkin.fewshot("flat", here / "new", **SMALL)
    assert found.eligible == 3
    with pytest.raises(ConfigError, match="--shot"):
        nearkin.fewshot("flat", "new", shot=5)


def test_shared_classes_are_warned_about(here, capsys, tmp_path):
    write_classes(tmp_path / "mixed", ("bee", "cow", "dog"), each=5)
    found, err = told(capsys, "flat", str(tmp_path / "mixed"))
    assert found["shared"] == ["bee"]
    assert err.startswith("warning: the run was trained on 1 of the 3 classes")
    assert "bee" in err
    # A class that has too few images is never drawn.
    shutil.rmtree(tmp_path / "mixed" / "bee")
    write_classes(tmp_path / "mixed", ("bee",), each=2)
    found, err = told(capsys, "flat", str(tmp_path / "mixed"))
    assert (found["shared"], found["classes"], found["eligible"], err) == ([], 3, 2, "")


@pytest.mark.parametrize("seeds", [{"seed": 3}, {"seed": 3, "split_seed": 7}])
def test_its_own_validation_images_are_those_that_it_held_out(here, tmp_path, monkeypatch, seeds):
    run, drawn = tmp_path / "run", []
    words = [f"--{name.replace('_', '-')}={value}" for name, value in seeds.items()]
    trained(str(run), "base", "--val-split", "0.3", *words)

    def watched(bundle, split, rows, **options):
        drawn.extend(split.images.name(row) for row in range(len(split.labels)))
        return extract(bundle, split, rows, **options)

    extract = features.extract
    monkeypatch.setattr(features, "extract", watched)
    nearkin.fewshot(run, "base", **SMALL)
    held = load_dataset("base", val_split=0.3, **seeds).splits["val"]
    assert drawn == [held.images.name(row) for row in range(len(held.labels))]


@pytest.mark.parametrize(
    ("folder", "data", "words", "split"),
    [
        ("splits", "split", [], "test"),
        ("splits", "./split/", ["--split", "test"], "test"),
        ("flat", "base", [], "val"),
        ("flat", "base/../base", ["--split", "val"], "val"),
    ],
)
def test_of_its_own_data_only_what_it_was_not_trained_on(here, capsys, folder, data, words, split):
    found, err = told(capsys, folder, data, *words)
    assert found["split"] == split
    assert found["shared"] == ["ant", "bee"]
    assert "all 2 classes" in err


def test_digits(here, capsys):
    assert run(["train", "digits", *QUICK[:4], "--threads", "1", "--quiet", "--out", "ten"]) == 0
    found, _ = told(capsys, "ten", "digits", "--ways", "10")
    assert (found["split"], found["eligible"], len(found["shared"])) == ("test", 10, 10)
    refused(capsys, 3, ["ten", "digits", "--split", "train", *WORDS], "trained on", "digits")


def test_training_images_are_refused(here, capsys, tmp_path):
    refused(capsys, 3, ["flat", "base", "--split", "train", *WORDS], "split train", "base")
    refused(capsys, 3, ["whole", "base", *WORDS], "all images of base", "other data")
    refused(
        capsys, 3, ["splits", "split/train", *WORDS], "11 images of these 12", "ant"
    )  # 1 is val
    # The same files under another name, and in a table.
    (tmp_path / "link").symlink_to(here / "base")
    shutil.copytree(here / "new", tmp_path / "some")
    (tmp_path / "some" / "cow" / "own.png").hardlink_to(here / "base" / "ant" / "0.png")
    refused(capsys, 3, ["whole", str(tmp_path / "some"), *WORDS], "1 image of these 18", "cow")
    found, _ = told(capsys, "flat", str(tmp_path / "link"))
    assert found["split"] == "val"
    rows = [f"{here}/base/{name}/{n}.png,{name}" for name in ("ant", "bee") for n in range(20)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    refused(capsys, 3, ["flat", str(tmp_path / "table.csv"), *WORDS], "28 images of these 40")


def test_training_data_that_are_gone_are_told(here, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, err = told(capsys, str(here / "flat"), str(here / "new"))
    assert "cannot be read" in found["notes"][0]
    assert re.match("warning: the training data of .*flat, base, cannot be read", err)


def test_too_few_images(here, capsys):
    refused(capsys, 3, ["flat", "new"], "16 images", "0 of 4", "fewer --ways")
    refused(capsys, 3, ["flat", "new", "--ways", "3"], "--queries 4")
    refused(capsys, 3, ["flat", "new", "--ways", "3", "--shots", "5"], "fewer --shots")
    refused(capsys, 3, ["flat", "new", "--split", "val"], "leave out --split")


def test_bad_words(here, capsys):
    refused(capsys, 2, [], "Give the folder")
    refused(capsys, 2, ["flat"], "Give the folder")
    refused(capsys, 2, ["flat", "new", "--ways", "1"], "--ways", "greater than or equal to 2")
    refused(capsys, 2, ["flat", "new", "--episodes", "1"], "--episodes")
    refused(capsys, 2, ["flat", "new", "--copies=-1"], "--copies")
    refused(capsys, 2, ["flat", "new", "--shots", "many"], "--shots", "many")
    refused(capsys, 2, ["flat", "new", "--shotz", "1"], "--shotz", "--shots")
    refused(capsys, 3, ["flat", "nowhere"], "nowhere")
    refused(capsys, 4, ["new", "new"], "no finished model")


def test_errors_from_python(here):
    with pytest.raises(ModelError):
        nearkin.fewshot("nowhere", "new")
    with pytest.raises(DataError):
        nearkin.fewshot("flat", "new")


def test_unreadable_images_stop_or_go(here, capsys, tmp_path):
    shutil.copytree(here / "new", tmp_path / "bad")
    (tmp_path / "bad" / "cow" / "0.png").write_bytes(b"no image")
    refused(capsys, 3, ["flat", str(tmp_path / "bad"), *WORDS], "cow/0.png", "--bad-images skip")
    found, err = told(capsys, "flat", str(tmp_path / "bad"), "--bad-images", "skip")
    assert found["eligible"] == 3
    assert "1 unreadable image left out" in err


def test_unreadable_images_of_its_own_data_can_be_left_out(here, capsys, tmp_path):
    shutil.copytree(here / "split", tmp_path / "again")
    spoiled = tmp_path / "again" / "test" / "ant" / "0.png"
    spoiled.write_bytes(bytes(spoiled.stat().st_size))
    again = str(tmp_path / "again")
    assert run(["fewshot", "splits", again, *WORDS]) == 3
    assert "--bad-images skip" in capsys.readouterr().err
    assert told(capsys, "splits", again, "--bad-images", "skip")[0]["split"] == "test"


def test_data_without_splits_are_all(here, capsys):
    assert told(capsys, "flat", "new", "--split", "all")[0]["split"] == "all"
    assert run(["fewshot", "flat", "new", *WORDS, "--split", "val"]) == 3
    assert "have no splits; leave out --split" in capsys.readouterr().err
    assert run(["fewshot", "flat", "split", *WORDS, "--split", "all"]) == 3
    assert "no split all, only train, test" in capsys.readouterr().err


def test_help_loads_no_torch(capsys):
    import subprocess
    import sys

    program = (
        "import sys; from nearkin.cli import run; run(['fewshot', '--help']); "
        "print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--queries" in done.stdout
    assert run(["--help"]) == 0
    assert "fewshot   RUN DATA" in capsys.readouterr().out
