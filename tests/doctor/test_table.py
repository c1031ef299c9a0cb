"""What the doctor found is left out of the table that it writes, and training takes that table."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tests.doctor.photos import one_colour, photo, write_photos

from nearkin.cli import run
from nearkin.data.sources.resolve import resolve
from nearkin.doctor.findings import COLUMNS
from nearkin.files import SaveFailed


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    Image.open(data / "test/ant/0.png").save(data / "train/ant/leak.png")
    (data / "train/bee/bad.png").write_bytes(b"no image")
    return data


def doctor(*words, forecast=False):
    """Without networks of the usual size."""
    switches = ["--no-labels", *([] if forecast else ["--no-forecast"]), "--device", "cpu"]
    return run(["doctor", *map(str, words), *switches])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_verb_lists_findings_and_files(data, tmp_path, capsys):
    assert doctor(data) == 3
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["ok", "classes"],
        ["error", "unreadable"],
        ["error", "exact-leakage"],
    ]
    rows = table(tmp_path / "doctor.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["path"].rpartition("/")[2] for row in rows] == ["bad.png", "leak.png", "0.png"]
    assert "3 files concerned, listed in doctor.csv" in shown.err
    assert "2 errors, 0 warnings" in shown.err


def test_what_training_would_refuse_is_an_error(tmp_path, monkeypatch, capsys):
    """One image of each class: none can be held out."""
    monkeypatch.chdir(tmp_path)
    for seed, kind in enumerate(("ant", "bee", "cat")):
        (tmp_path / "data" / kind).mkdir(parents=True)
        photo(seed).save(tmp_path / "data" / kind / "0.png")
    assert doctor("data", "--objective", "ce", "--write-table", "t.csv", forecast=True) == 3
    shown = capsys.readouterr()
    assert re.search(r"error +objective +training would not start: No class has two", shown.out)
    assert "it cannot be trained on: No class has two training images" in shown.err
    assert "next: nearkin train" not in shown.err


def test_a_broken_image_hides_no_warning_of_the_forecast(data, capsys):
    words = ["--objective", "supcon", "--objective.views", "1", "--batch-size", "2"]
    words += ["--sampler", "shuffle"]
    assert doctor(data, *words, forecast=True) == 3
    assert re.search(r"warning +no-positives", capsys.readouterr().out)


def test_json_and_out(data, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    assert doctor(data, "--json", "--out", tmp_path / "here") == 3
    record = json.loads(capsys.readouterr().out)
    assert (record["errors"], record["warnings"], record["run"]) == (2, 0, None)
    assert [f["code"] for f in record["findings"]][:3] == ["classes", "unreadable", "exact-leakage"]
    assert record["findings"][1] | {"text": ""} == {
        "level": "error",
        "code": "unreadable",
        "text": "",
        "files": 1,
    }
    assert (tmp_path / "here/doctor.csv").exists()
    assert not (tmp_path / "doctor.csv").exists()


def test_strict_makes_warnings_count(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    assert doctor(data, "--strict") == 0
    assert not (tmp_path / "doctor.csv").exists()  # there is nothing to list
    photo(0).save(data / "train/ant/again.png")
    assert doctor(data) == 0
    assert doctor(data, "--strict") == 3
    (data / "train/ant/again.png").unlink()
    assert doctor(data) == 0
    assert table(tmp_path / "doctor.csv") == []  # the list of an earlier time is replaced
    capsys.readouterr()


def test_a_table_without_what_was_found_can_be_trained_on(data, tmp_path, capsys):
    (tmp_path / "tables").mkdir()
    clean = tmp_path / "tables/clean.csv"
    assert doctor(data, "--write-table", clean) == 3
    rows = table(clean)
    assert len(rows) == 48
    names = {(row["path"], row["label"], row["split"]) for row in rows}
    assert ("../data/test/ant/0.png", "ant", "test") in names
    assert not any("leak" in row["path"] or "bad" in row["path"] for row in rows)
    assert {split: len(part.labels) for split, part in resolve(str(clean)).parts.items()} == {
        "train": 36,
        "test": 12,
    }
    words = ["--epochs", "1", "--batch-size", "16", "--image-size", "32", "--from-scratch"]
    small = ["--model", "test_resnet", "--objective", "ce", "--out", str(tmp_path / "run")]
    assert run(["train", str(clean), *words, *small, "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["test_top1"] is not None
    assert doctor(clean, "--out", tmp_path / "tables") == 0


def marks(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label", "split", "mark", "correct"), *rows])
    return path


def test_marked_images_are_left_out_or_get_their_label(data, tmp_path, capsys):
    given = marks(
        tmp_path / "marks.csv",
        (data / "train/ant/1.png", "ant", "train", "wrong label", ""),
        ("train/ant/2.png", "ant", "train", "wrong label", "bee"),  # relative to the data
        ("data/test/cow/3.png", "cow", "test", "leave out", ""),  # relative to here
        ("train/ant/3.png", "ant", "train", "", ""),
        ("train/ant/gone.png", "ant", "train", "leave out", ""),
    )
    assert doctor(data, "--write-table", "clean.csv", "--marks", given) == 3
    rows = {row["path"]: row["label"] for row in table(tmp_path / "clean.csv")}
    assert len(rows) == 46
    assert "data/train/ant/1.png" not in rows
    assert "data/test/cow/3.png" not in rows
    assert rows["data/train/ant/2.png"] == "bee"
    assert rows["data/train/ant/3.png"] == "ant"
    said = capsys.readouterr().err
    assert "1 marked path not among the images: train/ant/gone.png" in said
    assert re.search(
        r"note: 46 images in clean.csv, (\d+) left out \(2 marked, \d+ copied or unreadable\)", said
    )


def concerned(path):
    """finding -> the last two parts of the paths it concerns."""
    found = {}
    for row in table(path):
        found.setdefault(row["finding"], set()).add("/".join(row["path"].split("/")[-2:]))
    return found


def test_marked_images_are_in_no_finding(tmp_path, monkeypatch, capsys):
    """And the copy of an image in another class stays once the wrong one is marked, or gets the right label."""
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    one_colour(9).save(data / "train/ant/blank.png")
    (data / "train/bee/bad.png").write_bytes(b"no image")
    photo(3).save(data / "train/cow/again.png")  # an ant
    photo(4).save(data / "train/cow/more.png")  # an ant
    assert doctor(data) == 3
    before = concerned(tmp_path / "doctor.csv")
    assert before["exact-two-classes"] == {
        "ant/3.png",
        "cow/again.png",
        "ant/4.png",
        "cow/more.png",
    }
    assert before["unreadable"] == {"bee/bad.png"}
    assert before["blank"] == {"ant/blank.png"}
    given = marks(
        tmp_path / "marks.csv",
        ("train/ant/blank.png", "ant", "train", "leave out", ""),
        ("train/bee/bad.png", "bee", "train", "leave out", ""),
        ("train/cow/again.png", "cow", "train", "wrong label", ""),
        ("train/cow/more.png", "cow", "train", "wrong label", "ant"),
    )
    assert doctor(data, "--marks", given, "--write-table", "clean.csv") == 0
    assert concerned(tmp_path / "doctor.csv") == {"exact-copies": {"ant/4.png", "cow/more.png"}}
    kept = {row["path"] for row in table(tmp_path / "clean.csv")}
    assert "data/train/ant/3.png" in kept
    assert len({"data/train/ant/4.png", "data/train/cow/more.png"} & kept) == 1
    capsys.readouterr()


def lines(text):
    """finding -> its text."""
    return {line.split()[1]: line for line in text.splitlines()}


def test_classes_are_those_after_the_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    (data / "test/wasp").mkdir()
    photo(77).save(data / "test/wasp/0.png")
    assert doctor(data) == 3
    before = lines(capsys.readouterr().out)
    assert "wasp" in before["unknown-class"]
    assert "36 train, 13 test images" in before["classes"]
    given = marks(
        tmp_path / "marks.csv",
        ("test/wasp/0.png", "wasp", "test", "wrong label", "ant"),
        ("train/ant/0.png", "ant", "train", "leave out", ""),
    )
    assert doctor(data, "--marks", given) == 0
    after = lines(capsys.readouterr().out)
    assert "unknown-class" not in after
    assert "3 classes; 35 train, 13 test images; 11 to 12" in after["classes"]
    marks(given, ("train/ant/0.png", "ant", "train", "wrong label", "aant"))
    assert doctor(data, "--marks", given) == 3
    assert (
        "1 class has a single training image: aant"
        in lines(capsys.readouterr().out)["single-image"]
    )


def test_a_table_that_cannot_be_trained_on_is_no_next_step(tmp_path, monkeypatch, capsys):
    """The copies of contradicting labels go, and with them all training images of two classes."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        for kind in ("ant", "bee"):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            photo(number).save(tmp_path / "data" / kind / f"{number}.png")
    photo(8).save(tmp_path / "data/bee/8.png")
    assert doctor("data", "--write-table", "clean.csv") == 0
    said = capsys.readouterr().err
    assert "it cannot be trained on: the data have one class only, bee" in said
    assert "next:" not in said


def test_marks_are_no_table_to_train_on(data, tmp_path, capsys):
    given = marks(tmp_path / "marks.csv", ("train/ant/1.png", "ant", "train", "wrong label", ""))
    assert run(["train", str(given)]) == 3
    said = capsys.readouterr().err
    assert f"nearkin doctor DATA --marks {given} --write-table clean.csv" in said


def test_leaks_are_counted_for_each_split(tmp_path, monkeypatch, capsys):
    """Two images of val show a test image, and one of test is also in train."""
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    (data / "val/ant").mkdir(parents=True)
    for name in ("0", "1"):
        Image.open(data / "test/ant/0.png").save(data / f"val/ant/{name}.png")
    Image.open(data / "test/bee/0.png").save(data / "train/bee/leak.png")
    assert doctor(data) == 3
    said = lines(capsys.readouterr().out)["exact-leakage"]
    assert "1 of 12 test images has an exact copy in train" in said
    assert "2 images of val have an exact copy in test" in said


@pytest.mark.parametrize("linked", [False, True])
def test_a_table_in_another_folder_names_the_files(tmp_path, monkeypatch, capsys, linked):
    """A link to the table's folder, too, and the marks of such a table's images."""
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    photo(0).save(data / "train/ant/line\rbreak.png")
    place = Path("far/away/tables")
    place.mkdir(parents=True)
    if linked:
        Path("tables").symlink_to(place)
        place = Path("tables")
    assert doctor(data, "--write-table", place / "clean.csv") == 0
    images = resolve(str(place / "clean.csv")).parts["train"].images
    assert all(Path(images.path(row)).is_file() for row in range(len(images)))
    listed = resolve(str(place / "clean.csv")).parts["train"].images.path(5)
    given = marks(tmp_path / "marks.csv", (listed, "ant", "train", "leave out", ""))
    assert doctor(place / "clean.csv", "--marks", given, "--write-table", "again.csv") == 0
    assert len(table(tmp_path / "again.csv")) == len(table(place / "clean.csv")) - 1
    capsys.readouterr()


def test_a_new_table_follows_a_step_up_from_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "b" / "data")
    (tmp_path / "b" / "sub").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "sub")
    assert doctor("a/link/../data", "--write-table", "clean.csv") == 0
    images = resolve("clean.csv").parts["train"].images
    assert images.name(0).startswith("b/data/train/")


def test_findings_are_shown_though_the_table_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_photos(tmp_path / "data")
    given = marks(
        tmp_path / "marks.csv",
        *((path, "", "", "leave out", "") for path in (data / "train").glob("*/*")),
    )
    assert doctor(data, "--write-table", "clean.csv", "--marks", given) == 3
    shown = capsys.readouterr()
    assert "no training image is left" in shown.out
    assert "No training image is left" in shown.err


def test_findings_are_shown_though_they_cannot_be_written(data, monkeypatch, capsys):
    def full(*_):
        raise SaveFailed("doctor.csv could not be written")

    monkeypatch.setattr("nearkin.doctor.findings.write_csv", full)
    assert doctor(data) == 75
    shown = capsys.readouterr()
    assert "exact-leakage" in shown.out
    assert "doctor.csv could not be written" in shown.err


@pytest.mark.parametrize("words", [("--out", "fixed"), ("--write-table", "fixed/clean.csv")])
def test_a_place_that_cannot_be_written_is_said_before_images_are_read(
    data, tmp_path, monkeypatch, capsys, words
):
    (tmp_path / "fixed").mkdir()
    monkeypatch.setattr("os.access", lambda folder, _: Path(folder).name != "fixed")
    monkeypatch.setattr("nearkin.doctor.diagnose.diagnose", None)
    assert doctor(data, *words) == 2
    assert "its folder is read-only; give another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("path,label\na.png,ant\n", "columns path and mark"),
        (
            "path,mark\ntrain/ant/1.png,maybe\n",
            "the mark 'maybe' is none of wrong label, leave out",
        ),
        ("path,mark\ntrain/ant/1.png\n", "line 2: 1 field instead of 2"),
        ('path,mark\n"train\n', "not valid CSV"),
        (b"\xff\xfep\0a\0", "is in UTF-16 or UTF-32; save it as UTF-8"),
        ("path,mark\n" + "x" * 2**21, "line 2: it is longer than a million characters"),
        (
            "path,mark\nelsewhere.png,leave out\n",
            "The 1 marked path in marks.csv is no image of these data",
        ),
        (None, "cannot be read"),
    ],
)
def test_marks_that_cannot_be_used(data, tmp_path, capsys, text, what):
    if text is not None:
        (tmp_path / "marks.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert doctor(data, "--write-table", "clean.csv", "--marks", "marks.csv") == 3
    assert what in capsys.readouterr().err
    assert not (tmp_path / "clean.csv").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "Examine which data?"),
        (("{data}", "--write-table", "table.txt"), "ends in .csv"),
        (("{data}", "--write-table", "no/table.csv"), "no such folder"),
        (("{data}", "--write-table", "there.csv"), "exists"),
        (("digits", "--marks", "there.csv"), "are no files"),
        (("{data}", "--out", "no"), "is no folder"),
        (("{data}", "--out", "foreign"), "was not written by nearkin doctor"),
        (("{data}", "--objective", "supcom"), "supcon"),
        (("{data}", "--batch-size", "many"), "whole number"),
        (("{data}", "--batch-size", "4000"), "larger than"),
        (("digits", "--write-table", "new.csv"), "are no files"),
        (("{data}", "--write-table", "doctor.csv"), "is the list of findings"),
    ],
)
def test_options_that_do_not_fit(data, tmp_path, capsys, words, what):
    (tmp_path / "there.csv").write_text("keep")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/doctor.csv").write_text("patient,illness\n")
    forecast = "--batch-size" in words or "--objective" in words
    assert doctor(*(word.format(data=data) for word in words), forecast=forecast) == 2
    shown = capsys.readouterr()
    assert what in shown.err
    assert (tmp_path / "there.csv").read_text() == "keep"
    assert (tmp_path / "foreign/doctor.csv").read_text() == "patient,illness\n"


def test_data_and_run_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert doctor("nowhere") == 3
    assert doctor("digits", "--run", "nowhere") == 4
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()


def test_several_processes_are_refused(data, tmp_path, monkeypatch, capsys):
    launch = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    launch |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nearkin.distributed.report_failure", lambda error: None)
    for verb in ("doctor", "predict", "embed", "export", "report", "fewshot", "import-cone"):
        assert run([verb, str(data)]) == 2
        said = f"nearkin {verb} is one process; start it without torchrun"
        assert said in capsys.readouterr().err
    assert not (tmp_path / "doctor.csv").exists()
