"""Bad input gets one clear sentence, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tests.pictures import write_classes, write_image

from nearkin.cli import run
from nearkin.files import SaveFailed

FAST = [
    "--epochs",
    "1",
    "--model",
    "test_resnet",
    "--image-size",
    "16",
    "--threads",
    "1",
    "--workers",
    "0",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, code, *words, argv):
    """Run `argv`; it must fail with `code`, and one sentence on stderr that holds all of `words`."""
    assert run(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("nearkin: error: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in last, last
    return last


def untouched(here):
    return not (here / "runs").exists() and not (here / "run").exists()


CASES = {
    "unknown option": (
        2,
        ["train", "digits", "--bach-size", "3"],
        ["--bach-size", "--batch-size?"],
    ),
    "unknown objective option": (
        2,
        ["train", "digits", "--objective", "cone", "--objective.topc", "3"],
        ["--objective.topc", "--objective.topk?"],
    ),
    "objective option out of range": (
        2,
        ["train", "digits", "--objective", "cone", "--objective.topk", "0"],
        ["--objective.topk '0'", "greater than or equal to 1"],
    ),
    "option of no named objective": (
        2,
        ["train", "digits", "--objective.neighbour-weight", "1"],
        ["--objective.neighbour-weight", "--objective cone"],
    ),
    "unknown objective": (2, ["train", "digits", "--objective", "kone"], ["kone", "cone?"]),
    "unknown model": (2, ["train", "digits", "--model", "resnet19"], ["resnet19", "resnet18"]),
    "missing folder": (3, ["train", "nowhere/"], ["nowhere"]),
    "misspelt name": (3, ["train", "digts"], ["digts", "digits"]),
    "folder without images": (3, ["train", "empty"], ["empty"]),
    "one class only": (3, ["train", "single"], ["one class"]),
    "batch larger than the data": (
        2,
        ["train", "photos", "--batch-size", "500", *FAST],
        ["500", "larger"],
    ),
    "accumulate with supcon": (
        2,
        [
            "train",
            "photos",
            "--objective",
            "supcon",
            "--accumulate",
            "2",
            "--batch-size",
            "8",
            *FAST,
        ],
        ["--accumulate 2", "supcon", "BatchNorm", "--objective.head-norm"],
    ),
    "fp16 on a cpu": (2, ["train", "--precision", "fp16", "--device", "cpu"], ["bf16"]),
    "run folder that exists": (
        2,
        ["train", "photos", "--out", "taken", *FAST],
        ["taken", "--resume"],
    ),
    "out is a file": (2, ["train", "photos", "--out", "file.txt", *FAST], ["file.txt"]),
    "resume of nothing": (4, ["train", "--resume", "nowhere"], ["nowhere", "does not exist"]),
    "resume of no run": (4, ["train", "--resume", "photos"], ["photos", "no run folder"]),
    "evaluate of no run": (4, ["evaluate", "photos"], ["photos", "model.json"]),
    "evaluate of nothing": (2, ["evaluate"], ["Give the folder"]),
    "predict of nothing": (2, ["predict", "photos"], ["image files"]),
    "weights that are no weights": (
        4,
        ["train", "photos", "--weights", "file.txt", *FAST],
        ["file.txt"],
    ),
    "missing weights": (4, ["train", "photos", "--weights", "none.pth", *FAST], ["none.pth"]),
    "missing config": (2, ["train", "--config", "none.yaml"], ["none.yaml"]),
    "list what": (2, ["list", "model"], ["models"]),
    "one image for BatchNorm": (
        2,
        ["train", "photos", "--batch-size", "8", "--accumulate", "8", *FAST],
        ["BatchNorm", "at least two"],
    ),
    "fewer epochs than stages": (
        2,
        ["train", "photos", "--objective", "supcon", "--objective.mode", "two-stage", *FAST],
        ["--epochs 1", "contrast, linear"],
    ),
    "bad workers": (2, ["evaluate", "photos", "--workers", "x"], ["--workers"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, here, capsys):
    write_classes(here / "photos")
    write_classes(here / "single", classes=("cat",))
    (here / "empty" / "cat").mkdir(parents=True)
    (here / "taken").mkdir()
    (here / "taken" / "precious").write_text("x")
    (here / "file.txt").write_text("no checkpoint")
    code, argv, words = CASES[case]
    refused(capsys, code, *words, argv=argv)
    assert untouched(here)
    assert (here / "taken" / "precious").read_text() == "x"
    assert sorted(p.name for p in (here / "taken").iterdir()) == ["precious"]


def test_a_class_with_one_image_is_a_note(here, capsys):
    write_classes(here / "photos")
    write_image(here / "photos" / "owl" / "1.png")
    assert run(["train", "photos", "--out", "run", *FAST, "--batch-size", "8"]) == 0
    assert "owl" in capsys.readouterr().err


def test_weights_that_cannot_be_fetched(here, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "no-cache"))
    write_classes(here / "photos")
    argv = ["train", "photos", "--pretrained", *FAST]
    refused(capsys, 4, "test_resnet", "--weights FILE", argv=argv)
    assert untouched(here)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "huge"])
def test_bad_images_stop_the_run_before_training_and_are_listed(damage, here, capsys):
    write_classes(here / "photos", suffix=".jpg")
    bad = here / "photos" / "cat" / "3.jpg"
    if damage == "truncated":
        bad.write_bytes(bad.read_bytes()[:-200])
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "text":
        bad.write_text("hello")
    else:
        from PIL import Image

        Image.new("L", (9000, 9000)).save(bad)
    argv = ["train", "photos", "--out", "run", "--batch-size", "8", *FAST]
    before = bad.read_bytes()
    refused(capsys, 3, "3.jpg", "--bad-images skip", "bad_files.csv", argv=argv)
    assert [p.name for p in (here / "run").iterdir()] == ["bad_files.csv"]
    assert "3.jpg" in (here / "run" / "bad_files.csv").read_text()
    assert run([*argv, "--bad-images", "skip", "--quiet"]) == 0
    assert "3.jpg" in (here / "run" / "bad_files.csv").read_text()
    assert bad.read_bytes() == before
    assert (here / "run" / "model.safetensors").exists()


def test_a_mended_image_leaves_no_stale_list(here, capsys):
    write_classes(here / "photos")
    (here / "photos" / "cat" / "3.png").write_bytes(b"")
    argv = ["train", "photos", "--batch-size", "8", *FAST]
    assert run(argv) == 3
    assert run(argv) == 3
    (folder,) = (here / "runs").iterdir()
    assert [p.name for p in folder.iterdir()] == ["bad_files.csv"]
    write_image(here / "photos" / "cat" / "3.png")
    assert run(argv) == 0
    assert not (folder / "bad_files.csv").exists()
    assert (folder / "model.safetensors").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on a folder of photos."""
    home = tmp_path_factory.mktemp("trained")
    write_classes(home / "photos", each=20)
    words = ["train", "photos", "--out", "run", "--batch-size", "8", *FAST, "--epochs", "3"]
    words += ["--quiet", "--objective", "cone", "--objective.bank", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run(words) == 0
    return home


@pytest.fixture
def finished(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    capsys.readouterr()
    return trained


def test_resume_of_a_finished_run_says_so(finished, capsys):
    assert run(["train", "--resume", "run"]) == 0
    assert "finished" in capsys.readouterr().err


def test_resume_with_changed_settings(finished, capsys):
    line = refused(
        capsys, 4, "lr", "epochs", argv=["train", "--resume", "run", "--lr", "9", "--epochs", "7"]
    )
    assert "-> 7" in line
    assert run(["train", "--resume", "run", "--workers", "1", "--save-minutes", "2"]) == 0


def test_resume_checks_the_objectives_options_too(finished, capsys):
    assert run(["train", "--resume", "run", "--objective.bank", "16"]) == 0
    capsys.readouterr()
    refused(capsys, 4, "16 -> 17", argv=["train", "--resume", "run", "--objective.bank", "17"])
    refused(
        capsys, 2, "--objective.bunk", argv=["train", "--resume", "run", "--objective.bunk", "1"]
    )
    refused(capsys, 4, "out", argv=["train", "--resume", "run", "--out", "elsewhere"])
    assert run(["train", "--resume", "run", "--print-config"]) == 0
    assert "bank: 16" in capsys.readouterr().out


def test_options_may_stand_between_words(finished, capsys):
    assert run(["predict", "run", "--json", "photos/dog/3.png", "photos/cat/1.png"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 2
    assert run(["evaluate", "run", "--json", "photos"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4  # the run's own validation images


def test_predict_prints_nothing_before_it_can(finished, capsys):
    assert run(["predict", "nowhere", "photos"]) == 4
    assert capsys.readouterr().out == ""


def test_without_a_test_split_the_validation_split_is_named(finished, capsys):
    result = json.loads((finished / "run" / "model.json").read_text())["metrics"]
    assert result["split"] == "val"
    assert run(["train", "--resume", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_top1"] is None


def test_weights_of_a_run_bring_its_stem(finished, capsys):
    words = ["train", "photos", "--out", "next", "--weights", "run/model.safetensors", *FAST]
    assert run([*words, "--batch-size", "8", "--objective", "cone", "--objective.bank", "16"]) == 0
    assert "stem: small" in Path("next/config.yaml").read_text()
    assert "tensors" in capsys.readouterr().err


def test_evaluate_says_which_split(finished, capsys):
    assert run(["evaluate", "run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["split"] == "val"
    assert result["test_top1"] is None
    assert result["n"] == 4
    refused(capsys, 3, "test", "val", argv=["evaluate", "run", "--split", "test"])


def test_evaluate_with_another_class_list(finished, capsys):
    write_classes(finished / "birds", classes=("cat", "owl"), each=2)
    refused(capsys, 3, "owl", argv=["evaluate", "run", "birds"])


def test_predict_gives_every_file_a_row(finished, capsys):
    write_image(finished / "new" / "good.png", 0)
    (finished / "new" / "bad.png").write_bytes(b"no image")
    assert run(["predict", "run", "new", "photos/dog/3.png"]) == 3
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("path,class,probability,top5,error,")
    assert len(lines) == 4
    assert lines[1].startswith("new/bad.png,,,,")
    assert lines[2].startswith(("new/good.png,cat", "new/good.png,dog"))
    assert "1 of 3 files" in captured.err
    assert run(["predict", "run", "new/good.png", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert rows[0]["probability"] == pytest.approx(max(p["probability"] for p in rows[0]["top5"]))
    refused_missing = run(["predict", "run", "none.png"])
    assert refused_missing == 3


def copy_run(finished, to):
    import shutil

    shutil.copytree(finished / "run", to)
    return to


def test_a_model_that_is_no_model(finished, capsys, tmp_path):
    run_folder = copy_run(finished, tmp_path / "broken")
    (run_folder / "model.safetensors").write_bytes(b"garbage")
    refused(capsys, 4, "model.safetensors", argv=["evaluate", str(run_folder)])
    (run_folder / "model.json").write_text('{"format": 99}')
    refused(capsys, 4, "format 99", argv=["evaluate", str(run_folder)])
    (run_folder / "model.json").write_text("[1]")
    refused(capsys, 4, "model.json", argv=["evaluate", str(run_folder)])


def test_one_changed_bit_of_a_model_is_noticed(finished, capsys, tmp_path):
    run_folder = copy_run(finished, tmp_path / "flipped")
    weights = run_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(capsys, 4, "model.safetensors", "SHA-256", argv=["evaluate", str(run_folder)])


def test_bad_images_of_other_data_can_be_left_out(finished, capsys):
    write_classes(finished / "other", each=3)
    (finished / "other" / "cat" / "1.png").write_bytes(b"no image")
    refused(capsys, 3, "1.png", "--bad-images skip", argv=["evaluate", "run", "other"])
    argv = ["evaluate", "run", "other", "--json", "--bad-images"]
    assert run([*argv, "skip"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 5
    low, high = result["interval"]
    assert 0 <= low < result["top1"] + 1e-9 <= high + 1e-9 <= 1 + 1e-9
    refused(capsys, 2, "bad-images", argv=[*argv, "drop"])


@pytest.mark.parametrize("place", ["train", "val"])
def test_a_report_can_leave_out_images_that_broke_since(finished, capsys, tmp_path, place):
    from nearkin.data.dataset import load_dataset

    shutil.copytree(finished / "photos", tmp_path / "moved")
    run_folder = copy_run(finished, tmp_path / "run")
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    options = {name: config[name] for name in ("val_split", "split_seed", "seed")}
    split = load_dataset(str(tmp_path / "moved"), **options).splits[place]
    Path(split.images.path(0)).write_bytes(b"no image")
    argv = ["report", str(run_folder), "--data", str(tmp_path / "moved")]
    refused(capsys, 3, "--bad-images skip", argv=argv)
    assert run([*argv, "--bad-images", "skip"]) == 0


@pytest.mark.parametrize("name", ["classes.json", "identity.json"])
@pytest.mark.parametrize("content", ["5", "[" * 100_000])
def test_a_run_whose_files_are_no_longer_what_they_were(finished, capsys, tmp_path, name, content):
    run_folder = copy_run(finished, tmp_path / "odd")
    status = json.loads((run_folder / "status.json").read_text())
    (run_folder / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    (run_folder / name).write_text(content)
    refused(capsys, 4, name, argv=["train", "--resume", str(run_folder)])


def test_a_class_count_that_does_not_fit(finished, capsys, tmp_path):
    run_folder = copy_run(finished, tmp_path / "changed")
    description = json.loads((run_folder / "model.json").read_text())
    description["spec"]["classes"].append("owl")
    (run_folder / "model.json").write_text(json.dumps(description))
    refused(capsys, 4, "does not fit", argv=["evaluate", str(run_folder)])


def test_all_checkpoints_damaged(finished, capsys, tmp_path):
    run_folder = copy_run(finished, tmp_path / "damaged")
    status = json.loads((run_folder / "status.json").read_text())
    (run_folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    for file in Path(run_folder, "checkpoints").glob("step-*/network.safetensors"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    refused(capsys, 4, "damaged", argv=["train", "--resume", str(run_folder)])


def test_data_that_changed_since_the_run(finished, capsys, tmp_path):
    run_folder = copy_run(finished, tmp_path / "moved")
    status = json.loads((run_folder / "status.json").read_text())
    (run_folder / "status.json").write_text(json.dumps(status | {"state": "running"}))
    extra = write_image(finished / "photos" / "cat" / "extra.png")
    try:
        refused(capsys, 4, "not those of the run", argv=["train", "--resume", str(run_folder)])
    finally:
        extra.unlink()


def test_memory_that_runs_out(here, capsys, monkeypatch):
    from nearkin.training.step import Stepper

    def hungry(*_):
        torch.empty(1 << 50)

    monkeypatch.setattr(Stepper, "step", hungry)
    write_classes(here / "photos")
    argv = ["train", "photos", "--out", "run", "--batch-size", "8", *FAST]
    refused(capsys, 6, "memory ran out", "--batch-size", argv=argv)
    assert json.loads((here / "run" / "status.json").read_text())["state"] == "failed"


def test_a_loss_that_is_not_finite(here, capsys, monkeypatch):
    from nearkin.objectives import CoNe
    from nearkin.training.checkpoint.store import Store

    plain = CoNe.forward

    def poisoned(self, batch, student, teacher, progress):
        loss = plain(self, batch, student, teacher, progress)
        return not_finite(loss) if progress.step == 4 else loss

    monkeypatch.setattr(CoNe, "forward", poisoned)
    write_classes(here / "photos", each=20)
    argv = ["train", "photos", "--out", "run", "--batch-size", "8", *FAST, "--epochs", "3"]
    refused(capsys, 6, "step 4", "replay.json", argv=[*argv, "--save-minutes", "0.00001"])
    replay = json.loads((here / "run" / "replay.json").read_text())
    assert replay["step"] == 4
    assert len(replay["index"]) == 8
    assert json.loads((here / "run" / "status.json").read_text())["state"] == "diverged"
    newest = Store(here / "run" / "checkpoints").load_newest(print)
    assert newest.step <= 4
    assert all(torch.isfinite(t).all() for t in newest.tensors["network"].values())


def test_a_replay_that_cannot_be_written_does_not_hide_the_divergence(here, capsys, monkeypatch):
    from nearkin.training import loop
    from nearkin.training.step import Stepper

    def full(*_):
        raise SaveFailed("planted: no room")

    plain = Stepper.step
    monkeypatch.setattr(loop, "write_json", full)
    monkeypatch.setattr(Stepper, "step", lambda *words: not_finite(plain(*words)))
    write_classes(here / "photos")
    argv = ["train", "photos", "--out", "run", "--batch-size", "8", "--log-level", "warning", *FAST]
    assert run(argv) == 6
    warning, error = capsys.readouterr().err.splitlines()[-2:]
    assert warning == "warning: planted: no room"
    assert "The loss is not finite at step 0" in error
    assert "replay.json" not in error


def not_finite(loss):
    return loss._replace(total=loss.total * float("nan"))


def test_a_bug_is_called_a_bug(here, capsys, monkeypatch):
    import nearkin.cli.list_ as verb

    def broken(_):
        raise KeyError("\x1b[31mred")

    monkeypatch.setattr(verb, "main", broken)
    assert run(["list", "models"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nearkin: bug: KeyError")
    assert "\x1b" not in error
    assert run(["list", "models", "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "KeyError" in error


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_memory_that_ran_out_is_no_bug(here, capsys, monkeypatch, error):
    import nearkin.cli.list_ as verb

    def greedy(_):
        raise error

    monkeypatch.setattr(verb, "main", greedy)
    assert run(["list", "models"]) == 6
    assert capsys.readouterr().err.startswith("nearkin: error: The memory ran out; ")


def test_debug_does_not_change_the_exit_code(here, capsys):
    assert run(["train", "nowhere", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_path_that_the_system_refuses_is_no_bug(here, capsys, monkeypatch):
    import nearkin.cli.list_ as verb

    def closed(_):
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/run")

    monkeypatch.setattr(verb, "main", closed)
    assert run(["list", "models"]) == 2
    assert capsys.readouterr().err == (
        "nearkin: error: /closed/run cannot be used: Permission denied.\n"
    )
