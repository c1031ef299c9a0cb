"""nearkin predict and nearkin embed: formats, lists, patterns, sheets, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from tests.evaluation.evidence_run import some_digits, trained, write_digits
from tests.pictures import write_classes

import nearkin
from nearkin.cli import run as command
from nearkin.cli.predict import _say_coverage

HEADER = "path,class,probability,top5,error,unlike,kin,guess,set"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(trained(tmp_path_factory.mktemp("verb") / "run"))


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Five digits in `new`, the second of which is no image."""
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "new", 5)
    (tmp_path / "new" / "01.png").write_text("no image")
    capsys.readouterr()
    return tmp_path


def feed(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def refused(capsys, code, text, *words):
    assert command(list(words)) == code
    err = capsys.readouterr().err
    assert text in err.splitlines()[-1], err


def test_every_format_says_the_same(run, here, capsys):
    words = ["predict", run, "new", "--sets", "0.9", "--kin", "2"]
    assert command(words) == 3
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == HEADER
    assert re.search(r"sets of 90 %: measured coverage [\d.]+ % on 360 test images", shown.err)
    plain = rows_of(shown.out)
    assert [row["path"] for row in plain] == [f"new/{k:02d}.png" for k in range(5)]
    assert command([*words, "--json"]) == 3
    whole = json.loads(capsys.readouterr().out)
    assert whole["run"] == run
    assert command([*words, "--format", "jsonl"]) == 3
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == whole[
        "predictions"
    ]
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet"):
        assert command([*words, "--out", name]) == 3
        assert capsys.readouterr().out == ""
    assert json.loads(Path("a.json").read_text()) == whole
    assert Path("a.csv").read_text() == shown.out
    table = pyarrow.parquet.read_table("a.parquet").to_pylist()
    assert table == [
        row | ({"kin": [], "top5": []} if row["error"] else {}) for row in whole["predictions"]
    ]
    for row, one in zip(plain, whole["predictions"], strict=True):
        if one["error"]:
            assert (row["error"], row["class"], row["kin"], row["set"]) == (
                one["error"],
                "",
                "",
                "",
            )
            continue
        assert row["class"] == row["guess"] == one["class"]
        assert float(row["unlike"]) == pytest.approx(one["unlike"], abs=1e-6)
        near = [
            [k["path"], k["class"], pytest.approx(k["similarity"], abs=1e-6)] for k in one["kin"]
        ]
        assert json.loads(row["kin"]) == near
        assert len(near) == 2
        assert json.loads(row["set"]) == one["set"]


def test_rejected_images_keep_their_guess(run, here, capsys):
    assert command(["predict", run, "new/00.png", "new/02.png", "--reject", "0.9999"]) == 0
    shown = rows_of(capsys.readouterr().out)
    assert {row["class"] for row in shown} == {"unknown"}
    for row in shown:
        assert row["guess"] == json.loads(row["top5"])[0][0]
        assert float(row["probability"]) == pytest.approx(json.loads(row["top5"])[0][1], abs=1e-6)


@pytest.mark.parametrize(
    "content",
    [
        b"new/04.png\nnew/00.png\ngone.png\n",
        b"new/04.png\r\nnew/00.png\r\n\r\ngone.png",
        b"new/04.png\0new/00.png\0gone.png\0",
    ],
)
def test_a_list_on_stdin(run, here, capsys, monkeypatch, content):
    feed(monkeypatch, content)
    assert command(["predict", run, "new/03.png", "-", "new/02.png"]) == 3
    shown = capsys.readouterr()
    paths = ["new/03.png", "new/04.png", "new/00.png", "gone.png", "new/02.png"]
    rows = rows_of(shown.out)
    assert [row["path"] for row in rows] == paths
    assert [row["error"] for row in rows] == ["", "", "", "no such file or directory", ""]
    assert "1 of 5 files" in shown.err


def test_names_in_a_list_may_hold_anything(run, here, capsys, monkeypatch):
    odd = "new/a\n[b]*.png"
    shutil.copy("new/00.png", odd)
    feed(monkeypatch, odd.encode() + b"\0new\0")
    assert command(["predict", run, "-"]) == 3
    rows = rows_of(capsys.readouterr().out)
    assert [row["path"] for row in rows][:2] == [odd, "new/00.png"]
    assert len(rows) == 7
    feed(monkeypatch, b"\n")
    refused(capsys, 3, "no paths on stdin", "predict", run, "-")


def test_patterns(run, here, capsys):
    (here / "new" / "deep").mkdir()
    shutil.copy("new/00.png", "new/deep/x.png")
    (here / "new" / "notes.txt").write_text("")
    Path("new/01.png").unlink()
    names = ["new/00.png", "new/02.png", "new/03.png", "new/04.png"]
    for pattern, expected in (
        ("new/0[0-3].png", names[:3]),
        ("new/*", [*names, "new/deep/x.png"]),
        ("new/**", [*names, "new/deep/x.png"]),
        ("n?w/**/*.png", [*names, "new/deep/x.png"]),
    ):
        assert command(["predict", run, pattern]) == 0
        shown = capsys.readouterr()
        assert sorted(row["path"] for row in rows_of(shown.out)) == expected, pattern
        assert ("1 file that is no image" in shown.err) == (pattern in ("new/*", "new/**"))
    Path("new/[a].png").write_bytes(Path("new/00.png").read_bytes())
    assert command(["predict", run, "new/[a].png"]) == 0, "a file of that very name"
    refused(capsys, 3, "matches no image", "predict", run, "new/*.tif")


def test_patterns_find_what_a_folder_would(run, here, capsys):
    """Not what systems leave behind, and no file once more by each turn of a loop of links."""
    for name in ("@eaDir/00.png", "__MACOSX/00.png"):
        (here / "new" / name).parent.mkdir()
        shutil.copy("new/00.png", here / "new" / name)
    (here / "new" / "deep").mkdir()
    shutil.copy("new/00.png", "new/deep/x.png")
    (here / "new" / "deep" / "loop").symlink_to("..")
    (here / "elsewhere").mkdir()
    shutil.copy("new/00.png", "elsewhere/y.png")
    (here / "new" / "link").symlink_to(here / "elsewhere")
    assert command(["predict", run, "new"]) == 3
    wanted = {row["path"] for row in rows_of(capsys.readouterr().out)}
    for pattern in ("new/**/*.png", "new/**", str(here / "new" / "**" / "*.png")):
        assert command(["predict", run, pattern]) == 3
        shown = capsys.readouterr()
        found = [row["path"].removeprefix(f"{here}{os.sep}") for row in rows_of(shown.out)]
        assert sorted(found) == sorted(wanted), pattern
        assert "hidden matches are left out" in shown.err
    assert command(["predict", run, "new/@eaDir/*"]) == 0, "a name that the pattern gives"


def test_entries_of_a_folder_are_paths(run, here):
    with os.scandir("new") as entries:
        entry = next(each for each in entries if each.name == "00.png")
    for given in (entry, [entry]):
        assert [one.path for one in nearkin.predict(run, given)] == ["new/00.png"]


def test_the_longest_name_that_a_file_system_allows(run, here, capsys):
    out = here / f"{'x' * 251}.csv"
    assert command(["predict", run, "new/00.png", "--out", str(out)]) == 0
    assert len(rows_of(out.read_text())) == 1


def test_embed_says_why_there_are_no_labels(run, here, capsys):
    write_classes(here / "data", each=3)
    shutil.copy("new/00.png", "data/beside.png")
    assert command(["embed", run, "data", "--out", "e.npz"]) == 0
    assert "data: 1 image outside the class folders: no labels" in capsys.readouterr().err
    assert "labels" not in np.load("e.npz")
    for split in ("train", "training"):
        write_classes(here / "twice" / split, each=3)
    assert command(["embed", run, "twice", "--out", "e.npz"]) == 0
    assert "two folders for the split train" in capsys.readouterr().err
    assert command(["embed", run, "new/00.png", "new/02.png", "--out", "e.npz"]) == 0
    shutil.copytree("new", "flat")
    Path("flat/01.png").unlink()
    assert command(["embed", run, "flat", "--out", "e.npz"]) == 0
    assert "labels" not in capsys.readouterr().err


def test_out_is_refused_before_anything_is_computed(run, here, capsys):
    before = Path("new/00.png").read_bytes()
    refused(capsys, 2, "says no format", "predict", run, "new", "--out", "new/00.png")
    refused(capsys, 2, "is a folder", "predict", run, "new", "--out", "new", "--format", "csv")
    refused(capsys, 2, "does not exist", "predict", run, "new", "--out", "gone/a.csv")
    os.mkfifo("pipe")
    os.mkfifo("pipe.npz")
    refused(capsys, 2, "no regular file", "predict", run, "new", "--out", "pipe", "--json")
    refused(capsys, 2, "no regular file", "embed", run, "new", "--out", "pipe.npz")
    refused(capsys, 2, "needs a file", "predict", run, "new", "--format", "parquet")
    refused(capsys, 2, "differ", "predict", run, "new", "--format", "csv", "--json")
    refused(capsys, 2, "Did you mean jsonl", "predict", run, "new", "--format", "jsnl")
    assert Path("new/00.png").read_bytes() == before


def test_parquet_without_pyarrow(run, here, capsys, monkeypatch):
    monkeypatch.setattr("nearkin.cli.rows.find_spec", lambda name: None)
    refused(capsys, 2, "nearkin[parquet]", "predict", run, "new", "--out", "a.parquet")
    refused(capsys, 2, "nearkin[parquet]", "embed", run, "new", "--out", "a.parquet")


def test_a_failure_leaves_no_file(run, here, capsys, monkeypatch):
    from nearkin.network import Network

    def broken(*_):
        raise MemoryError

    Path("a.csv").write_text("earlier")
    monkeypatch.setattr(Network, "forward", broken)
    assert command(["predict", run, "new", "--out", "a.csv"]) == 6
    assert Path("a.csv").read_text() == "earlier"
    assert sorted(os.listdir()) == ["a.csv", "new"]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.npz"])
def test_a_name_that_is_not_utf8(run, here, name):
    path = b"new/caf\xe9.png"
    shutil.copy(b"new/00.png", path)
    verb = "embed" if name.endswith(".npz") else "predict"
    assert command([verb, run, os.fsdecode(path), "--out", name]) == 0
    if name.endswith(".parquet"):
        assert pyarrow.parquet.read_table(name).to_pylist()[0]["path"] == "new/caf\\xe9.png"
    elif name.endswith(".csv"):
        assert path in Path(name).read_bytes()
    else:
        assert os.fsencode(str(np.load(name)["paths"][0])) == path


def sheets(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".jpg"))


def test_a_sheet_for_each_image_that_can_be_read(run, here, capsys):
    names = ["new/<b> x&\n.png", "new/..png", "new/" + "é" * 80 + ".png"]
    for name in names:
        shutil.copy("new/00.png", name)
    words = ["predict", run, *names, "new/01.png", "new/02.png", "--explain", "why"]
    assert command(words) == 3
    assert sheets("why") == ["1-b_x.jpg", "2.jpg", "3.jpg", "5-02.jpg"]
    with Image.open("why/5-02.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.size[0] == 960
    assert command(["predict", run, "new/00.png", "--explain", "why", "--sets", "0.9"]) == 0
    assert sheets("why") == ["1-00.jpg"], "those of the earlier call are gone"


def test_sheets_of_an_earlier_call_are_no_images(run, here, capsys):
    Path("new/01.png").unlink()
    words = ["predict", run, "new", "--explain", "new/why"]
    for note in ("", "note: 4 sheets of an earlier call in new/why left out"):
        assert command(words) == 0
        shown = capsys.readouterr()
        assert len(rows_of(shown.out)) == 4
        assert note in shown.err
    refused(capsys, 3, "All 4 images are sheets", *words[:2], "new/why", *words[3:])
    assert len(sheets("new/why")) == 4


def test_a_folder_of_others_is_refused_and_untouched(run, here, capsys):
    before = {path: path.read_bytes() for path in (here / "new").iterdir()}
    refused(capsys, 2, "holds other files", "predict", run, "new", "--explain", "new")
    refused(capsys, 2, "is no folder", "predict", run, "new", "--explain", "new/00.png")
    assert {path: path.read_bytes() for path in (here / "new").iterdir()} == before
    (here / "why").mkdir()
    assert command(["predict", run, "new/00.png", "--explain", "why"]) == 0
    (here / "why" / "1-02.jpg").write_text("mine")
    refused(capsys, 2, "another file 1-02.jpg", "predict", run, "new/02.png", "--explain", "why")
    assert (here / "why" / "1-02.jpg").read_text() == "mine"
    assert sheets("why") == ["1-00.jpg", "1-02.jpg"]
    listed = json.dumps(["../new/00.png", "1-02.jpg/../../new/02.png", "new"])
    (here / "why" / ".nearkin-sheets.json").write_text(listed)
    (here / "why" / "1-02.jpg").unlink()
    assert command(["predict", run, "new/02.png", "--explain", "why"]) == 0
    assert {path: path.read_bytes() for path in (here / "new").iterdir()} == before


def test_a_run_without_kin(run, here, capsys):
    shutil.copytree(run, "bare")
    Path("bare/kin.safetensors").unlink()
    assert command(["predict", "bare", "new/00.png"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("kin.safetensors") == 1
    (row,) = rows_of(shown.out)
    assert (row["unlike"], row["kin"]) == ("", "")
    for words in (["--reject", "0.1"], ["--sets", "0.9"], ["--explain", "why"]):
        refused(capsys, 4, "kin.safetensors", "predict", "bare", "new", *words)
    assert not Path("why").exists()


def test_sets_that_take_long_to_measure_are_told(capsys, monkeypatch):
    text = "the sets are measured on the run's test images"
    for limit in (60.0, 0.0):
        monkeypatch.setattr("nearkin.data.look.QUIET_SECONDS", limit)
        slow = SimpleNamespace(coverage=lambda: time.sleep(0.2))
        _say_coverage(slow, 0.9)
        assert (text in capsys.readouterr().err) == (limit == 0.0)


def test_coverage_that_cannot_be_measured_is_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos", each=20)
    fast = "--epochs 0 --model test_resnet --image-size 16 --threads 1 --workers 0 --batch-size 8 --quiet"
    assert command(["train", "photos", "--objective", "ce", "--out", "r", *fast.split()]) == 0
    capsys.readouterr()
    words = ["predict", "r", "photos/cat/0.png", "--sets", "0.5", "--explain", "why"]
    assert command(words) == 0
    shown = capsys.readouterr()
    assert "coverage not measured" in shown.err
    (kin,) = (json.loads(row["kin"]) for row in rows_of(shown.out))
    assert all((tmp_path / "photos" / near[0]).is_file() for near in kin)
    shutil.move("photos", "elsewhere")
    assert command([words[0], "r", "elsewhere/cat/0.png", *words[3:]]) == 0
    assert "coverage not measured" in capsys.readouterr().err
    assert sheets("why") == ["1-0.jpg"], "kin whose files are gone are said to be gone"


def test_the_python_functions_give_what_the_verb_gives(run, here, capsys):
    assert command(["predict", run, "new", "--json", "--reject", "0.2", "--sets", "0.7"]) == 3
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert [one.to_dict() for one in nearkin.predict(run, "new", reject=0.2, sets=0.7)] == rows
    model = nearkin.load(run, reject=0.2, sets=0.7)
    assert [one.to_dict() for one in model(["new"])] == rows


def test_embed_images(run, here, capsys):
    assert command(["embed", run, "new", "--out", "a.npz"]) == 3
    assert "1 of 5 files" in capsys.readouterr().err
    found = np.load("a.npz")
    assert set(found) == {"embeddings", "paths"}
    assert found["paths"].tolist() == [f"new/{k:02d}.png" for k in (0, 2, 3, 4)]
    arrays = some_digits(5)[0]
    wanted = nearkin.load(run).embed([arrays[k] for k in (0, 2, 3, 4)])
    assert np.allclose(found["embeddings"], wanted, atol=1e-5)
    refused(capsys, 2, "--out FILE.npz", "embed", run, "new")
    refused(capsys, 2, "--out FILE.npz", "embed", run, "new", "--out", "a.csv")
    refused(capsys, 3, "None of 1 image can be read", "embed", run, "new/01.png", "--out", "b.npz")
    assert not Path("b.npz").exists()


def test_embed_data_with_labels_and_splits(run, here, capsys):
    assert command(["embed", run, "digits", "--out", "a.npz", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    found = np.load("a.npz")
    assert (
        found["embeddings"].shape == (record["images"], record["width"]) == (1797, record["width"])
    )
    arrays, labels = some_digits()
    test = found["splits"] == "test"
    assert found["labels"][test].tolist() == labels
    assert np.allclose(
        found["embeddings"][test][:9], nearkin.load(run).embed(arrays[:9]), atol=1e-5
    )
    for split in ("train", "test"):
        for label in "01":
            write_digits(here / "data" / split / label, 2)
    assert command(["embed", run, "data", "--out", "a.parquet"]) == 0
    rows = pyarrow.parquet.read_table("a.parquet").to_pylist()
    assert [row["path"] for row in rows][::3] == [
        "data/train/0/00.png",
        "data/train/1/01.png",
        "data/test/1/00.png",
    ]
    assert [row["label"] for row in rows] == list("00110011")
    assert {len(row["embedding"]) for row in rows} == {record["width"]}
    Path("table.csv").write_text("path,label\nnew/02.png,a\nnew/00.png,b\n")
    assert command(["embed", run, "table.csv", "--out", "b.npz"]) == 0
    assert np.load("b.npz")["labels"].tolist() == ["a", "b"]
    shutil.copy("new/00.png", "data/extra.png")
    assert command(["embed", run, "data", "--out", "c.npz"]) == 0
    assert len(np.load("c.npz")["paths"]) == 9, "no image is left out"
    assert "labels" not in np.load("c.npz")
