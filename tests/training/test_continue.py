"""What a continued run accepts: its own options again, its images in another place, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from tests.pictures import write_classes

import nearkin
from nearkin.cli import run as command
from nearkin.config import RunConfig, read_yaml, validate
from nearkin.data.loader import WorkersDied
from nearkin.errors import ConfigError, DataError, ModelError, Stopped
from nearkin.files import SaveFailed
from nearkin.training.checkpoint.saver import Saver
from nearkin.training.metrics_log import read_metrics
from nearkin.training.report import report
from nearkin.training.run_folder import stored_settings
from nearkin.training.step import Stepper
from nearkin.training.trainer import Trainer

OPTIONS = {
    "objective": "ce",
    "epochs": 2,
    "model": "test_resnet",
    "image_size": 16,
    "batch_size": 8,
    "workers": 0,
}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run on `photos`, a relative path, that failed after its last step."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", failing)
        with pytest.raises(ConfigError, match="planted"):
            nearkin.train("photos", out="run", **OPTIONS)
    return tmp_path / "run"


def failing(*_args, **_kwargs):
    raise ConfigError("planted")


def test_evaluation_says_from_where_a_relative_path_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    run = nearkin.train("photos", out=tmp_path / "run", **OPTIONS).run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for call in (nearkin.evaluate, report):
        with pytest.raises(DataError, match="relative to the folder .* do it there") as caught:
            call(run)
        assert "give DATA to nearkin evaluate, --data DATA to nearkin report" in str(caught.value)
    assert nearkin.evaluate(run, tmp_path / "photos", split="val").n > 0


def test_a_damaged_config_is_a_damaged_run(tmp_path, capsys):
    write_classes(tmp_path / "photos")
    run = nearkin.train(tmp_path / "photos", out=tmp_path / "run", **OPTIONS).run
    (run / "config.yaml").write_text("epochs: [")
    assert command(["evaluate", str(run)]) == 4
    assert "config.yaml is damaged" in capsys.readouterr().err


def test_images_may_move(stopped, tmp_path):
    (tmp_path / "photos").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match="relative to the folder .* give the place of the images"):
        nearkin.train(resume=stopped)
    assert nearkin.train(resume=stopped, data="pictures").run == stopped
    assert stored_settings(stopped).data == "pictures"
    assert nearkin.evaluate(stopped).split == "val"


@pytest.mark.parametrize("words", [["pictures"], ["--data", "pictures"]])
def test_the_command_line_takes_the_new_place(stopped, tmp_path, words):
    (tmp_path / "photos").rename(tmp_path / "pictures")
    assert command(["train", "--resume", str(stopped), *words, "--quiet"]) == 0
    assert (stopped / "model.json").is_file()


@pytest.mark.parametrize("change", ["image", "name", "class"])
def test_other_images_are_refused(stopped, tmp_path, change):
    shutil.copytree(tmp_path / "photos", tmp_path / "pictures")
    image = tmp_path / "pictures" / "cat" / "3.png"
    if change == "image":
        image.write_bytes((tmp_path / "photos" / "dog" / "5.png").read_bytes() + bytes(99))
    else:
        image.rename(
            image.with_name("x.png") if change == "name" else image.parents[1] / "dog" / "x.png"
        )
    with pytest.raises(ModelError, match="images in pictures are not those"):
        nearkin.train(resume=stopped, data="pictures")
    assert stored_settings(stopped).data == "photos"


def test_other_images_are_refused_where_no_checkpoint_is(stopped, tmp_path):
    shutil.rmtree(stopped / "checkpoints")
    write_classes(tmp_path / "pictures", each=13)
    with pytest.raises(ModelError, match="images in pictures are not those"):
        nearkin.train(resume=stopped, data="pictures")


def test_the_same_options_may_be_given_again(stopped):
    with pytest.raises(ModelError, match=r"lr \(0.\d+ -> 0.3\)"):
        nearkin.train(resume=stopped, lr=0.3)
    with pytest.raises(ModelError, match=r"objective \(ce -> supcon\)"):
        nearkin.train("photos", "supcon", resume=stopped)
    result = nearkin.train("photos", resume=stopped, **OPTIONS, lr="auto")
    assert result.to_dict()["run"] == str(stopped)


def test_a_changed_config_file_is_refused(stopped):
    path = stopped / "config.yaml"
    path.write_text(path.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    with pytest.raises(ModelError, match="have changed since the run was started"):
        nearkin.train(resume=stopped)


def test_a_failure_after_a_resume_names_the_step(stopped, monkeypatch):
    before = json.loads((stopped / "status.json").read_text())
    assert before["step"] > 0
    monkeypatch.setattr(Trainer, "_finish", failing)
    with pytest.raises(ConfigError, match="planted"):
        nearkin.train(resume=stopped)
    after = json.loads((stopped / "status.json").read_text())
    assert (after["state"], after["step"], after["epoch"]) == ("failed", before["step"], 2)


def test_a_run_stores_its_settings_beside_the_options_given(stopped, capsys):
    settings = stored_settings(stopped)
    stored = yaml.safe_load((stopped / "config.yaml").read_text())
    assert [name for name, value in stored.items() if value == "auto"] == ["check"]
    given = read_yaml(stopped / "given.yaml")
    assert given.pop("data") == "photos"
    assert given.pop("out") == "run"
    assert given == OPTIONS
    again = validate(RunConfig, read_yaml(stopped / "config.yaml"))
    assert again.flat() == settings.flat()
    assert command(["train", "--print-config", "--config", str(stopped / "config.yaml")]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == yaml.safe_load((stopped / "config.yaml").read_text())
    assert command(["train", "--print-config", "--resume", str(stopped)]) == 0
    out = capsys.readouterr().out
    assert "# epochs: 2\n" in out
    assert yaml.safe_load(out) == shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--epochs", "many"], 2),
        (["--out", "."], 2),
        (["--resume", "nowhere"], 4),
        (["--resume", "."], 4),
    ],
)
def test_bad_options_and_run_folders_are_named_without_torch(words, code, tmp_path):
    program = (
        "import sys; from nearkin.cli import run; code = run(sys.argv[1:]);"
        "print(sorted({'torch', 'timm', 'sklearn'} & sys.modules.keys())); sys.exit(code)"
    )
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "digits", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (code, "[]\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_step_is_taken_again(stopped, monkeypatch):
    """The collapse watch and the count of steps come from the checkpoint."""
    taken = []
    step = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, *a: taken.append(a[-1]) or step(self, *a))
    nearkin.train(resume=stopped)
    assert taken == []
    saved = next((stopped / "checkpoints").glob("step-*/state.json")).read_text()
    assert json.loads(saved)["state"]["collapse"].keys() == {"stage", "warned", "epochs"}
    assert torch.get_num_threads() == stored_settings(stopped).threads


def test_of_equal_validations_the_lower_log_loss_is_kept():
    saver = Saver(None, {}, 5.0, stepper=None)
    seen = [(0.5, 0.9), (0.7, 0.8), (0.6, 0.1), (0.7, 0.9), (0.7, 0.6), (0.7, 0.6)]
    kept = [saver.consider(value, step, loss) for step, (value, loss) in enumerate(seen)]
    assert kept == [True, True, False, False, True, False]
    assert saver.best == (0.7, 4, 0.6)


def test_without_a_log_loss_the_earliest_of_equal_validations_is_kept():
    saver = Saver(None, {}, 5.0, stepper=None)
    assert [saver.consider(0.7, step) for step in range(2)] == [True, False]


def test_with_damaged_best_weights_a_run_ends_with_the_last_ones(stopped, capfd):
    (weights,) = (stopped / "checkpoints").glob("best-*/network.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    nearkin.train(resume=stopped, quiet=False)
    assert "are damaged" in capfd.readouterr().err
    assert (stopped / "model.json").is_file()


def test_a_stop_says_whether_the_last_steps_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    monkeypatch.setattr("nearkin.training.loop.stop_requested", lambda: True)
    with pytest.raises(Stopped, match="everything is saved"):
        nearkin.train("photos", out="saved", **OPTIONS)
    monkeypatch.setattr(Saver, "save", lambda *_: "the disk is full.")
    with pytest.raises(Stopped, match="the last steps could not be saved"):
        nearkin.train("photos", out="lost", **OPTIONS)


def test_when_an_image_is_gone_the_steps_so_far_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    step = Stepper.step

    def losing(self, batch, progress, number):
        shutil.rmtree(tmp_path / "photos" / "cat", ignore_errors=True)
        return step(self, batch, progress, number)

    monkeypatch.setattr(Stepper, "step", losing)
    with pytest.raises(DataError, match="a training with --resume"):
        nearkin.train("photos", out="run", cache="off", **OPTIONS)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_start_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise SaveFailed("no space")

    with monkeypatch.context() as patch:
        patch.setattr("nearkin.training.run_folder.write_origin", full)
        with pytest.raises(SaveFailed, match="no space"):
            nearkin.train("digits", out="run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_known_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    (tmp_path / "closed").mkdir()
    with pytest.raises(ConfigError, match="nothing can be made in"):
        nearkin.train("photos-that-are-nowhere", out=tmp_path / "closed" / "run")


def test_a_name_that_is_too_long_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="File name too long"):
        nearkin.train("photos-that-are-nowhere", out=tmp_path / ("x" * 300))
    assert command(["evaluate", "x" * 300]) == 2


def test_a_run_folder_that_is_removed_ends_the_run(tmp_path, monkeypatch):
    """A new one would lack the files that a run needs to go on."""
    step = Stepper.step

    def removing(self, batch, progress, number):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return step(self, batch, progress, number)

    monkeypatch.setattr(Stepper, "step", removing)
    monkeypatch.setattr(Saver, "due", lambda *_: True)
    with pytest.raises(SaveFailed, match="No such file"):
        nearkin.train("digits", out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "error",
    [
        Stopped("Stopped on request while evaluating; continue with --resume."),
        WorkersDied("A process that loads images was killed."),
    ],
)
def test_a_stop_in_a_validation_is_continued_with_that_validation(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos")
    options = OPTIONS | {"threads": 1, "epochs": 3}
    whole = nearkin.train("photos", out="whole", **options)
    validate, calls = Trainer._validate, []

    def stopping(self):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", stopping)
        with pytest.raises(type(error)):
            nearkin.train("photos", out="stopped", **options)
    resumed = nearkin.train(resume="stopped")
    files = [(run / "model.safetensors").read_bytes() for run in (whole.run, resumed.run)]
    assert files[0] == files[1]
    steps = [
        [
            line["step"]
            for line in read_metrics(run / "metrics.jsonl")
            if line["kind"] == "validation"
        ]
        for run in (whole.run, resumed.run)
    ]
    assert steps[0] == steps[1]


def test_a_run_with_a_bad_image_that_was_deleted_goes_on(tmp_path, monkeypatch):
    """The list of names has changed, the images that are used have not."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_classes(tmp_path / "photos" / split)
    bad = tmp_path / "photos" / "train" / "cat" / "bad.png"
    bad.write_bytes(b"no image")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", failing)
        with pytest.raises(ConfigError, match="planted"):
            nearkin.train("photos", out="run", bad_images="skip", **OPTIONS)
    bad.unlink()
    assert nearkin.train(resume="run").run.name == "run"


def test_the_size_of_groups_that_does_not_fit_the_batch_is_refused(tmp_path, stopped):
    nearkin.train(resume=stopped)
    with pytest.raises(ConfigError, match="no multiple of --per-class 5"):
        nearkin.train(
            "photos",
            "supcon",
            weights=stopped,
            per_class=5,
            out="other",
            objective_options={"views": 1},
            **{
                name: OPTIONS[name]
                for name in ("epochs", "model", "image_size", "batch_size", "workers")
            },
        )


def test_a_comparison_elsewhere_does_not_need_a_folder_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    from nearkin.training.api import checked_options

    assert checked_options({"data": "digits"})[0].data == "digits"
    with pytest.raises(ConfigError, match="nothing can be made in"):
        nearkin.train("digits")


@pytest.fixture
def torchrun(monkeypatch):
    def start(count):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")

    start(0)
    return start


def test_a_restart_by_torchrun_goes_on_with_the_run(torchrun, tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "photos")
    words = ["train", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    for name, value in (OPTIONS | {"save_minutes": 1e-9}).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    plain, failing = Stepper.step, 2

    def step(self, batch, progress, number):
        if number == failing:
            raise MemoryError
        return plain(self, batch, progress, number)

    monkeypatch.setattr(Stepper, "step", step)
    assert command(words) == 6
    torchrun(1)
    failing = 3
    capsys.readouterr()
    assert command(words) == 6
    said = capsys.readouterr().err
    assert said.startswith(f"torchrun has started this run again: {tmp_path / 'run'} goes on\n")
    assert "continuing at step 2\n" in said
    torchrun(2)
    failing = -1
    assert command(words) == 0
    assert "continuing at step 3\n" in capsys.readouterr().err
    steps = [
        r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert steps == sorted(set(steps))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("run")] == ["run"]


def test_a_restart_by_torchrun_takes_no_other_folder(torchrun, tmp_path, capsys):
    write_classes(tmp_path / "photos")
    words = ["train", str(tmp_path / "photos"), "--out", str(tmp_path)]
    torchrun(1)
    assert command(words) == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "config.yaml").exists()


def test_torchrun_with_restarts_needs_out(torchrun, tmp_path, monkeypatch, capsys):
    """Each start would train in a folder of its own, from the first step."""
    monkeypatch.chdir(tmp_path)
    assert command(["train", "digits", "--epochs", "1"]) == 2
    said = capsys.readouterr().err
    assert "(--max-restarts 3)" in said
    assert "give --out" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_more_validation_than_training_images_are_looked_at_less_often(tmp_path):
    """20 and 143 images, 40 epochs of one step: every second epoch, and the last."""
    options = {"images_per_class": 2, "batch_size": 20, "epochs": 41, "model": "test_resnet"}
    run = nearkin.train("digits", "ce", threads=1, out=tmp_path / "run", **options).run
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if line["kind"] == "validation"]
    assert steps == [*range(2, 41, 2), 41]
