"""Images that a run was trained on are recognised, and are no test of it."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.pictures import write_classes, write_image

import nearkin
from nearkin.data.dataset import names_of, sizes_of
from nearkin.data.sources.resolve import resolve
from nearkin.errors import ConfigError, DataError, ModelError
from nearkin.evaluation.own_data import Origin, is_own, place_of, stored_origin
from nearkin.objectives import CrossEntropy, Objective

OPTIONS = {"objective": "ce", "epochs": 1, "model": "test_resnet", "image_size": 16}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on `photos`, whose validation images are held out from its training images."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    nearkin.train("photos", out="run", batch_size=8, workers=0, report=False, **OPTIONS)
    return tmp_path / "run"


def test_its_own_images_are_evaluated_as_they_were_split(run, tmp_path):
    expected = nearkin.evaluate(run)
    assert str(tmp_path) not in (run / "identity.json").read_text()  # a path may name a person
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    for place in ("photos", tmp_path / "photos", "moved"):
        found = nearkin.evaluate(run, place)
        assert (found.split, found.n, found.top1) == ("val", expected.n, expected.top1)
        assert any("was trained on these data: their split val" in note for note in found.notes)


@pytest.mark.parametrize("place", ["own", "copy"])
def test_training_images_are_not_held_out_where_the_runs_own_val_is_gone(
    tmp_path, monkeypatch, place
):
    """A run with a val folder trained on all of train, of which no share judges it afterwards."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "own" / "train")
    write_classes(tmp_path / "own" / "val", each=4)
    nearkin.train("own", out="run", batch_size=8, workers=0, report=False, **OPTIONS)
    assert nearkin.evaluate("run").n == 8
    if place == "own":
        shutil.rmtree(tmp_path / "own" / "val")
    else:
        shutil.copytree(tmp_path / "own" / "train", tmp_path / "copy" / "train")
    with pytest.raises(DataError, match="neither a test nor a val split"):
        nearkin.evaluate("run", place)
    with pytest.raises(DataError, match="no split val"):
        nearkin.evaluate("run", place, split="val")
    assert nearkin.evaluate("run", place, split="train").n == 24
    with pytest.raises(DataError, match="trained on all images"):
        nearkin.fewshot("run", place, ways=2, shots=1, queries=1, episodes=2, copies=0)


def test_other_images_are_a_test(run, tmp_path):
    """Though they have the same names."""
    write_classes(tmp_path / "others", suffix=".png")
    write_image(tmp_path / "others" / "cat" / "3.png", number=99)
    found = nearkin.evaluate(run, "others")
    assert found.split == "test"
    assert not any("was trained on" in note for note in found.notes)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_files_that_were_trained_on_are_counted_under_any_path(run, tmp_path, link):
    write_classes(tmp_path / "others", ("cat", "dog"), each=2, suffix=".bmp")
    for kind in ("cat", "dog"):
        for photo in (tmp_path / "photos" / kind).iterdir():
            getattr(tmp_path / "others" / kind / photo.name, link)(photo)
    total = len(list((tmp_path / "others").glob("*/*")))
    trained = nearkin.evaluate(run, split="train").n
    (note,) = (note for note in nearkin.evaluate(run, "others").notes if "trained on" in note)
    assert note == (
        f"{run} was trained on {trained} of these {total} images, so the numbers are too good"
    )
    assert 0 < trained < total - 4, "others were held out for validation"


@pytest.mark.parametrize("change", ["added", "removed"])
def test_validation_images_that_cannot_be_told_are_refused(run, tmp_path, change):
    if change == "added":
        write_image(tmp_path / "photos" / "cat" / "another.png")
    else:
        (tmp_path / "photos" / "cat" / "3.png").unlink()
    for data in (None, "photos"):
        with pytest.raises(DataError, match="were added, removed or renamed since"):
            nearkin.evaluate(run, data)
    from nearkin.training.report import report

    with pytest.raises(DataError, match="were added, removed or renamed since"):
        report(run)


def test_a_folder_of_that_name_elsewhere_is_another(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_classes(tmp_path / "elsewhere" / "photos", each=3)
    assert nearkin.evaluate(run, "photos").split == "test"
    with pytest.raises(DataError, match="photos is another place .* with other images"):
        nearkin.evaluate(run)
    from nearkin.export.api import export
    from nearkin.training.report import report

    with pytest.raises(DataError, match="with other images"):
        report(run)
    with pytest.raises(DataError, match="with other images.* --data"):
        export(run, "torch", out=tmp_path / "exported")


def test_a_report_shows_the_images_of_its_run_only(run, tmp_path):
    from nearkin.training.report import report

    report(run)
    before = (run / "report.html").read_bytes()
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    assert report(run, data="moved", out=tmp_path / "page.html").is_file()
    write_classes(tmp_path / "others", suffix=".png")
    write_image(tmp_path / "others" / "cat" / "3.png", number=99)
    with pytest.raises(DataError, match="Training images in others have other sizes"):
        report(run, data="others")
    assert report(run, data="others", out=tmp_path / "page.html", bad_images="skip").is_file()
    write_image(tmp_path / "others" / "cat" / "99.png")
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match="others has other training images than"):
            report(run, data="others", bad_images=policy)
    assert (run / "report.html").read_bytes() == before


def test_runs_from_other_folders_have_no_images_in_common_by_a_relative_path(
    run, tmp_path, monkeypatch
):
    from nearkin.training.report import facts

    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere" / "photos")
    monkeypatch.chdir(tmp_path / "elsewhere")
    nearkin.train("photos", out="run", batch_size=8, workers=0, report=False, **OPTIONS)
    assert facts(run).root != facts(tmp_path / "elsewhere" / "run").root == "photos"
    monkeypatch.chdir(tmp_path)
    assert facts(run).root == "photos"


def test_a_copy_that_is_found_from_another_folder_is_evaluated(run, tmp_path, monkeypatch):
    expected = nearkin.evaluate(run)
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere" / "photos")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert nearkin.evaluate(run).top1 == expected.top1


def test_training_images_that_cannot_be_compared_are_told(run, tmp_path, monkeypatch):
    """A note that is missing would say that none of these images was trained on."""
    write_classes(tmp_path / "others", suffix=".bmp")
    assert nearkin.evaluate(run, "others").notes == ()
    monkeypatch.chdir(tmp_path.parent)
    (note,) = nearkin.evaluate(run, tmp_path / "others").notes
    assert "cannot be read, so these images were not compared with them" in note


def test_validation_weighs_an_ensemble_from_any_folder(run, tmp_path, monkeypatch):
    nearkin.train("photos", out="b", batch_size=8, workers=0, report=False, **OPTIONS)
    write_classes(tmp_path / "others", each=4)
    runs = [run, tmp_path / "b"]
    here = nearkin.evaluate(runs, "photos", weights="validation")
    monkeypatch.chdir(tmp_path.parent)
    there = nearkin.evaluate(runs, tmp_path / "photos", weights="validation")
    assert [one.weight for one in there.members] == [one.weight for one in here.members]
    with pytest.raises(DataError, match="--weights validation needs the validation images of the"):
        nearkin.evaluate(runs, tmp_path / "others", weights="validation")


def test_an_ensemble_of_which_one_was_trained_on_the_images(run, tmp_path):
    write_classes(tmp_path / "others", each=20)
    nearkin.train("others", out="second", batch_size=8, workers=0, report=False, **OPTIONS)
    found = nearkin.evaluate([run, tmp_path / "second"], "photos")
    assert found.split == "test"
    (note,) = [note for note in found.notes if "trained on" in note]
    assert note == f"{run} was trained on these data, so the numbers are too good"


def test_an_export_compares_on_any_images(run, tmp_path):
    from nearkin.export.api import export

    write_image(tmp_path / "photos" / "cat" / "another.png")
    assert export(run, "torch", out=tmp_path / "exported") is not None


def test_a_run_that_knows_only_the_place(run, tmp_path):
    (run / "identity.json").write_text("{}")
    assert stored_origin(run) is None
    assert nearkin.evaluate(run).split == "val"
    assert is_own(resolve("photos"), "photos", None)
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    assert not is_own(resolve("moved"), "photos", None)


def test_the_callers_random_numbers_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")

    def drawn(act):
        torch.manual_seed(3)
        act()
        return float(torch.rand(()))

    expected = drawn(lambda: None)
    quick = {"out": "run", "batch_size": 8, "workers": 0, "report": False, **OPTIONS}
    assert drawn(lambda: nearkin.train("photos", seed=9, **quick)) == expected
    assert drawn(lambda: nearkin.load("run")) == expected
    assert drawn(lambda: nearkin.evaluate("run")) == expected


def test_a_class_of_ones_own_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    write_classes(tmp_path / "photos")

    class Own(CrossEntropy, name="own"):
        pass

    own = {**OPTIONS, "objective": "own"}
    nearkin.train("photos", out="run", batch_size=8, workers=0, report=False, **own)
    with pytest.raises(ConfigError, match="which do not have own; install the package"):
        nearkin.compare("photos", "ce,own")
    del Objective.registry["own"]
    with pytest.raises(ModelError, match="import its module first"):
        nearkin.load("run")


def test_a_built_in_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = resolve("digits")
    assert is_own(digits, "digits", None)
    assert not is_own(
        digits,
        "photos",
        Origin(names_of(digits), sizes_of(digits), place_of(str(tmp_path / "photos"))),
    )
