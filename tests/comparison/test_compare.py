"""`nearkin compare` from options to files, with real runs on small images."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from tests.pictures import write_classes, write_image

import nearkin
from nearkin import process
from nearkin.cli import run as command
from nearkin.comparison import api, launch, tuning
from nearkin.comparison import run as comparison_run
from nearkin.comparison.api import compare
from nearkin.comparison.launch import Machine
from nearkin.comparison.plan import Terms
from nearkin.config import CompareOptions
from nearkin.errors import ConfigError, DataError, ModelError, Stopped
from nearkin.files import SaveFailed
from nearkin.process import GPU_THREADS, SHARE, cores
from nearkin.training.run_folder import stored_settings, stored_state

SMALL = {
    "epochs": 2,
    "batch_size": 8,
    "model": "resnet10t",
    "model_options": {"channels": [8, 8, 8, 8]},
}
WORDS = [
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--model",
    "resnet10t",
    "--model.channels",
    "[8,8,8,8]",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 20 images, without splits."""
    return write_classes(tmp_path_factory.mktemp("data") / "photos", each=20)


@pytest.fixture(scope="module")
def done(photos, tmp_path_factory):
    """A finished comparison, in which one entry fails: its learning rate is absurd."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = ["ce", "supcon", "ce:lr=1e30"]
    return compare(photos, words, seeds=2, jobs=2, out=out, **SMALL)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_run_is_an_ordinary_run_folder(done):
    runs = [run for run in done.runs if run.entry != "ce:lr=1e30"]
    assert [(run.entry, run.seed, run.state) for run in runs] == [
        ("ce", 0, "finished"),
        ("supcon", 0, "finished"),
        ("ce", 1, "finished"),
        ("supcon", 1, "finished"),
    ]
    for run in runs:
        assert nearkin.evaluate(done.folder / run.folder).top1 == pytest.approx(run.top1)
        assert run.seconds > 0
        assert run.crops_per_second > 0
        assert run.memory > 2**20
        assert len(run.curve) == stored_settings(done.folder / run.folder).epochs


def test_a_failed_run_is_shown_and_does_not_end_the_others(done):
    failed = [run for run in done.runs if run.state == "failed"]
    assert [run.entry for run in failed] == ["ce:lr=1e30"] * 2
    assert "not finite" in failed[0].error
    row = next(row for row in done.table() if row["entry"] == "ce:lr=1e30")
    assert (row["runs"], row["failed"], row["top1"]) == (0, 2, None)
    assert "failed: ce:lr=1e30, seed 0: " in (done.folder / "compare.md").read_text()


def test_runs_that_are_no_longer_asked_for_are_counted(done, photos, capfd, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(done.folder, copy)
    again = compare(photos, ["ce", "supcon"], seeds=1, jobs=2, out=copy, quiet=False, **SMALL)
    note = f"4 runs of other seeds or entries in {copy / 'runs'} are not shown"
    assert note in again.notes
    assert note in capfd.readouterr().err
    assert not any("other seeds" in note for note in done.notes)


def test_two_seeds_give_no_verdict(done):
    assert done.verdict("supcon") == "no verdict: 3 seeds are the least"
    with pytest.raises(ValueError, match="there are: supcon"):
        done.verdict("cone")


def test_numbers_are_those_of_the_run_folders(done):
    rows = table(done.folder / "compare.csv")
    for row, run in zip(rows, done.runs, strict=True):
        if run.state == "finished":
            stored = json.loads((done.folder / run.folder / "model.json").read_text())["metrics"]
            assert float(row["top1"]) == pytest.approx(stored["top1"])
            assert run.log_loss == pytest.approx(stored["log_loss"])
    assert "<!doctype html>" in (done.folder / "compare.html").read_text()
    record = json.loads((done.folder / "compare.json").read_text())
    assert record["table"][1]["entry"] == "supcon"
    assert record == json.loads(json.dumps(done.to_dict()))


def test_data_without_a_test_split_give_one_and_all_runs_share_it(done, photos):
    assert "no test split" in done.notes[0]
    rows = table(done.folder / "split.csv")
    assert sum(row["split"] == "test" for row in rows) == 8
    tested = set()
    for run in done.runs:
        if run.state == "finished":
            rows = table(done.folder / run.folder / "predictions.csv")
            tested.add(tuple(row["path"] for row in rows))
    assert len(tested) == 1
    assert len(tested.pop()) == 8


def test_the_same_call_goes_on_and_adds_seeds(done, photos, monkeypatch):
    started = []
    local = launch.local
    monkeypatch.setattr(
        launch,
        "local",
        lambda runs, names, *rest: (started.extend(names), local(runs, names, *rest)),
    )
    more = compare(photos, ["ce", "supcon"], seeds=3, jobs=2, out=done.folder, **SMALL)
    assert started == ["ce-seed2", "supcon-seed2"]
    assert {run.seed for run in more.runs} == {0, 1, 2}
    assert not more.verdict("supcon").startswith("no verdict")


def test_other_options_in_the_same_folder_are_refused(done, photos):
    with pytest.raises(ConfigError, match="other options: epochs"):
        compare(photos, ["ce", "supcon"], out=done.folder, **SMALL | {"epochs": 3})
    with pytest.raises(ConfigError, match="exists and holds no comparison"):
        compare(photos, ["ce", "supcon"], out=done.folder / "runs", **SMALL)


def again(done, photos, out, **changed):
    """The finished comparison once more, in a copy of its folder."""
    if not out.exists():
        shutil.copytree(done.folder, out)
    return compare(photos, ["ce", "supcon"], seeds=2, jobs=2, out=out, **SMALL | changed)


def test_a_folder_that_was_moved_goes_on(done, photos, tmp_path):
    found = again(done, f"{photos}/", tmp_path / "moved")
    assert [run.state for run in found.runs] == ["finished"] * 4


def test_json_is_the_record_and_text_is_the_table(done, photos, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(done.folder, out)
    words = ["compare", str(photos), "--objectives", "ce,supcon", "--seeds", "2", "--jobs", "2"]
    words += ["--out", str(out), *WORDS]
    assert command([*words, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record.items() >= json.loads((out / "compare.json").read_text()).items()
    assert [row["entry"] for row in record["table"]] == ["ce", "supcon"]
    assert command([*words, "--quiet"]) == 0
    said = capfd.readouterr()
    head, *rows = said.out.splitlines()
    assert head.split()[:4] == ["objective", "top-1", "%", "against"]
    assert [row.split()[0] for row in rows[:2]] == ["ce", "supcon"]
    assert "no verdict: 3 seeds are the least" in rows[1]
    assert said.out.rstrip().endswith(f"page {out / 'compare.html'}")
    assert said.err == ""


def test_a_comparison_that_was_killed_before_its_first_run_goes_on(done, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(done.folder / "compare.yaml", out)
    assert [run.state for run in again(done, photos, out).runs] == ["finished"] * 4


def test_changed_images_are_not_mixed_with_earlier_runs(done, photos, tmp_path):
    new = photos / "cat" / "new.png"
    write_image(new, 0, 99)
    out = shutil.copytree(done.folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="images in .*photos are not those of the runs in"):
        again(done, photos, out)
    new.unlink()
    # What the runs test on has not changed either.
    assert (out / "split.csv").read_bytes() == (done.folder / "split.csv").read_bytes()


def test_what_is_decoded_is_no_term(done, photos, tmp_path):
    """Less room in memory, where automatic caches are, changes no result."""
    out = shutil.copytree(done.folder, tmp_path / "out")
    for path in (out / "runs").glob("*.yaml"):
        assert "cache" not in path.read_text()
        path.write_text(f"{path.read_text()}cache: ram\n")  # of an earlier version
    assert [run.state for run in again(done, photos, out).runs] == ["finished"] * 4


def test_a_number_of_runs_at_a_time_is_kept_where_minutes_are_equal(tmp_path):
    values = {"data": "digits", "minutes": 1.0}
    for number, expected in ((3, 3), (5, 3)):
        options = CompareOptions(budget="minutes")
        folder, _ = api._folder(tmp_path / "out", "digits", api.Request(options, (), values, 0))
        planned = SimpleNamespace(machine=lambda *_, number=number: Machine(number))
        found = api._with_jobs(folder, planned, api.Request(options, (), values, 0))
        assert found.options.jobs == expected


@pytest.mark.parametrize("content", ["", "garbage\n", "path,label\na,b\n"])
def test_a_damaged_run_is_named(done, photos, tmp_path, content):
    out = shutil.copytree(done.folder, tmp_path / "out")
    (out / "runs" / "ce-seed0" / "predictions.csv").write_text(content)
    with pytest.raises(ModelError, match="ce-seed0 is damaged .*; remove its folder"):
        again(done, photos, out)
    shutil.rmtree(out / "runs" / "ce-seed0")
    assert [run.state for run in again(done, photos, out).runs] == ["finished"] * 4


def test_two_at_once_in_one_folder_are_refused(done, photos, tmp_path):
    out = shutil.copytree(done.folder, tmp_path / "out")
    program = (
        f"from nearkin.training.run_folder import locked; from pathlib import Path; lock = locked(Path({str(out)!r})); "
        "lock.__enter__(); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="Another process"):
            again(done, photos, out)
        other.communicate("\n")


def test_few_test_images_are_refused_before_anything_runs(tmp_path):
    few = write_classes(tmp_path / "few", each=10)
    with pytest.raises(DataError, match="4 test images, and 8 are the least"):
        compare(few, ["ce", "supcon"], out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "minutes"}, "needs --minutes"),
        ({"budget": "minutes", "minutes": 0}, "needs --minutes"),
        ({"budget": "minutes", "minutes": 3, "epochs": 4}, "leave --epochs out"),
        ({"pick": True, "val_split": 0}, "leave out --val-split 0"),
        ({"minutes": 3}, "--minutes needs --budget minutes"),
        ({"objective": "cone"}, "give --objectives"),
        ({"autotune": True}, "--autotune is not for compare; leave it out"),
        ({"log_every": 3}, "--log-every is not for compare"),
        ({"submit": "ray2"}, "submit"),
        ({"seeds": 0}, "seeds"),
        (
            {"pick": True, "images_per_class": 5, "data": "digits"},
            "needs image files, not built-in",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_runs(photos, tmp_path, options, message):
    asked = {k: v for k, v in options.items() if k in ("budget", "submit", "seeds", "pick")}
    values = {"data": str(photos)} | {k: v for k, v in options.items() if k not in asked}
    values["out"] = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        api.compare_options(asked, values, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_process_has_begun_is_not_removed(tmp_path, monkeypatch):
    """Before its first checkpoint, as when the result of a cluster is asked for too early."""
    from nearkin.comparison.run import _run
    from nearkin.training import run_folder

    (tmp_path / "ce-seed0").mkdir()
    (tmp_path / "ce-seed0.yaml").write_text("data: digits\n")
    code = f"""
import pathlib, sys
from nearkin.training import run_folder
with run_folder.locked(pathlib.Path({str(tmp_path / "ce-seed0")!r})):
    print("locked", flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        monkeypatch.setattr(comparison_run, "PATIENCE", 0)
        with pytest.raises(Stopped, match="Another process is training"):
            _run(tmp_path, "ce-seed0", {})
        assert (tmp_path / "ce-seed0").is_dir()
        monkeypatch.setattr(comparison_run, "PATIENCE", 60)
        monkeypatch.setattr(comparison_run, "LOOK", 0.1)
        timer = threading.Timer(0.5, other.communicate, ["\n"])
        timer.start()
        comparison_run._wait_for(tmp_path / "ce-seed0")
        timer.join()
        assert other.returncode == 0
    assert run_folder.stored_state(tmp_path / "ce-seed0") != "finished"


def test_a_run_that_was_killed_has_failed(photos, tmp_path, monkeypatch):
    def killed(folder, names, machine, ended):
        for name in names:
            ended(name, -9)

    monkeypatch.setattr(launch, "local", killed)
    found = compare(photos, "ce,supcon", seeds=1, out=tmp_path / "out", **SMALL)
    assert {run.state for run in found.runs} == {"failed"}
    assert "code -9, perhaps for want of memory" in found.runs[0].error
    assert (tmp_path / "out" / "compare.json").is_file()


def test_the_exit_code_when_every_run_failed(photos, tmp_path, monkeypatch, capsys):
    def failing(code):
        def local(folder, names, machine, ended):
            for name in names:
                ended(name, code)

        return local

    words = ["compare", str(photos), "--objectives", "ce,supcon", "--seeds", "1", *WORDS]
    for code, expected in ((1, 1), (Stopped.code, 0)):
        monkeypatch.setattr(launch, "local", failing(code))
        assert command([*words, "--out", str(tmp_path / str(code)), "--quiet"]) == expected
    assert "failed" in capsys.readouterr().out


def test_a_run_that_is_killed_while_stopping_has_not_failed(tmp_path, monkeypatch):
    """It ignores SIGTERM, and is killed when patience ends."""
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    ended = {}
    with pytest.raises(Stopped):
        launch.local(tmp_path, ["a"], Machine(1), ended.__setitem__)
    assert ended == {"a": Stopped.code}


def test_a_run_that_could_not_save_has_failed(tmp_path):
    """Its exit code is that of a stopped one."""
    (tmp_path / "a.error").write_text("No space left on device.\n")
    assert launch.outcome(tmp_path, "a", Stopped.code) == "a  failed: No space left on device."
    assert launch.outcome(tmp_path, "b", Stopped.code) == "b  stopped"


def test_how_many_run_at_a_time(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 4)
    monkeypatch.setattr(launch, "_free_memory", lambda: 8 << 30)
    assert Machine.of("auto", 10, "cpu", ()).number == 4
    assert Machine.of("auto", 3, "cpu", ()).number == 3
    assert Machine.of("auto", 10, "cuda", ("2", "5")).number == 2
    assert Machine.of(6, 10, "cuda", ("2", "5")).number == 6
    assert Machine.of(2, 10, "cpu", ()).words() == ["2", "auto"]
    assert Machine.of(4, 10, "cpu", ()).words() == ["1", "0"]
    assert Machine.of(1, 10, "cpu", ()).words() == []
    monkeypatch.setattr(launch, "_free_memory", lambda: 4 << 30)
    assert Machine.of("auto", 10, "cpu", ()).number == 2
    monkeypatch.setattr(launch, "cores", lambda: 64)
    shared = Machine.of(2, 10, "cuda", ("0",))
    assert shared.words() == [str(GPU_THREADS), "auto"]
    assert shared.environment(0)[SHARE] == "32"
    assert Machine.of(2, 10, "cpu", ()).words() == ["32", "auto"]


def test_a_container_may_allow_less_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "CONTAINER", tmp_path)
    free = launch._free_memory()
    for text, expected in (("max", free), ("1000", 1000)):
        (tmp_path / "memory.max").write_text(f"{text}\n")
        assert launch._free_memory() == pytest.approx(expected, rel=0.5)


def test_a_run_beside_others_has_its_share_of_the_cores(monkeypatch):
    assert SHARE not in Machine(1).environment(0)
    monkeypatch.setenv(SHARE, "3")
    assert cores() == 3


def test_runs_are_shared_out_over_the_gpus(monkeypatch):
    monkeypatch.setenv(launch.VISIBLE, "2,5")
    gpus = launch.visible_gpus()
    machine = Machine.of(3, 10, "cuda", gpus)
    used = [machine.environment(place)[launch.VISIBLE] for place in range(3)]
    assert used == ["2", "5", "2"]
    assert Machine(1).environment(0)[launch.VISIBLE] == "2,5"


def stub(folder, name, lines):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + lines)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A stub of sbatch that runs the tasks of the array one after another, and one of squeue."""
    folder = tmp_path / "bin"
    run_all = (
        'echo "$@" >> "$STUB/log"\nlast=${2##*-}; last=${last%%%*}\n'
        "for i in $(seq 0 $last); do\n"
        'SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_ARRAY_TASK_ID=$i bash "$4" "$5" || exit 1; done\necho 7\n'
    )
    stub(folder, "sbatch", run_all)
    stub(folder, "squeue", 'cat "$STUB/queue" 2>/dev/null\nexit 0\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(tmp_path))
    return tmp_path


def test_slurm_gets_an_array_with_a_task_for_each_run(photos, cluster):
    out = cluster / "it's here"
    found = compare(photos, ["ce", "supcon"], seeds=1, jobs=1, submit="slurm", out=out, **SMALL)
    assert (cluster / "log").read_text().split()[:2] == ["--parsable", "--array=0-1%1"]
    assert [run.state for run in found.runs] == ["finished", "finished"]
    (cluster / "queue").write_text("7_1 gpu nearkin R\n")
    with pytest.raises(ConfigError, match="array 7 still wait or run"):
        compare(photos, ["ce", "supcon"], seeds=2, jobs=1, submit="slurm", out=out, **SMALL)
    assert len((cluster / "log").read_text().splitlines()) == 1


def test_tasks_that_slurm_killed_are_told_and_submitted_again(cluster, monkeypatch):
    """One ended with an error, one without a word, one is new; afterwards none has an error any more."""
    runs = cluster / "runs"
    runs.mkdir()
    monkeypatch.setattr(launch, "command", lambda *_: ["true", "FOLDER", "NAME"])
    said = launch.slurm(runs, ["ce-seed0", "supcon-seed0"], None)
    assert said == "submitted as the array 7"
    (runs / "ce-seed0.error").write_text("DataError: gone\n")
    said = launch.slurm(runs, ["ce-seed0", "supcon-seed0", "ce-seed1"], None)
    assert said.startswith("submitted as the array 7; 1 had ended without a result or an error")
    assert not list(runs.glob("*.error"))


def test_what_sbatch_refused_was_not_submitted(cluster, monkeypatch):
    runs = cluster / "runs"
    runs.mkdir()
    monkeypatch.setattr(launch, "command", lambda *_: ["true", "FOLDER", "NAME"])
    (runs / "ce-seed0.error").write_text("DataError: gone\n")
    stub(cluster / "refusing", "sbatch", "echo invalid partition >&2; exit 1\n")
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{cluster / 'refusing'}{os.pathsep}{path}")
    with pytest.raises(ConfigError, match="sbatch refused: invalid partition"):
        launch.slurm(runs, ["ce-seed0", "ce-seed1"], None)
    assert (runs / "ce-seed0.error").read_text() == "DataError: gone\n"
    monkeypatch.setenv("PATH", path)
    assert launch.slurm(runs, ["ce-seed0", "ce-seed1"], None) == "submitted as the array 7"


def test_tasks_of_slurm_find_a_folder_that_was_moved(cluster, monkeypatch):
    first, second = cluster / "first", cluster / "second"
    first.mkdir()

    def touch(folder, name):
        return ["bash", "-c", 'touch "$0/$1-was-here"', str(folder), name]

    monkeypatch.setattr(launch, "command", touch)
    launch.slurm(first, ["a"], None)
    first.rename(second)
    launch.slurm(second, ["b"], None)
    assert {path.name for path in second.glob("*-was-here")} == {"a-was-here", "b-was-here"}


def test_slurm_without_sbatch_says_what_to_do(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="no sbatch on this machine; run `sbatch --array=0-1"):
        compare(photos, ["ce", "supcon"], seeds=1, submit="slurm", out=tmp_path / "out", **SMALL)


def comparing(photos, out, *words):
    return [
        *(sys.executable, "-m", "nearkin", "compare", str(photos), "--objectives", "ce,supcon"),
        *("--jobs", "2", "--out", str(out), *WORDS, *words),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seeds"), [(signal.SIGINT, "2"), (signal.SIGKILL, "1")])
def test_a_comparison_that_is_killed_goes_on_where_it_stopped(photos, tmp_path, number, seeds):
    out = tmp_path / "out"
    command = comparing(photos, out, "--seeds", seeds, "--epochs", "20", "--save-minutes", "0.01")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    first = out / "runs" / "ce-seed0"
    deadline = time.monotonic() + 150
    while not list(first.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, words = process.communicate(timeout=90)
    if number != signal.SIGKILL:
        assert process.returncode == Stopped.code, words
        assert f"--out {out}" in words
    while children(out):  # they save, even where their parent was killed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert stored_state(first) == "stopped"
    before = (first / "metrics.jsonl").read_text().splitlines()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing" in (first / "train.log").read_text()
    assert (first / "metrics.jsonl").read_text().splitlines()[: len(before) - 1] == before[:-1]
    assert "supcon" in done.stdout
    record = json.loads((out / "compare.json").read_text())
    assert {run["state"] for run in record["runs"]} == {"finished"}


def children(out):
    """Processes that train in the comparison."""
    found = subprocess.run(
        ["pgrep", "-f", f"nearkin.comparison.run {out}"], capture_output=True, check=False
    )
    return found.stdout.split()


@pytest.mark.slow
def test_pick_trains_the_winner_on_train_and_validation(done, photos, tmp_path):
    out = tmp_path / "out"
    found = again(done, photos, out, pick=True)
    entry, run = found.picked
    assert entry == "ce"  # two seeds show nothing
    settings = stored_settings(run_path := out / f"picked-{entry}")
    assert str(run_path) == run
    assert settings.val_split == 0
    assert json.loads((run_path / "classes.json").read_text()) == ["cat", "dog"]
    assert nearkin.evaluate(run).n == 8
    assert again(done, photos, out, pick=True).picked == found.picked


@pytest.mark.slow
def test_pick_finds_images_that_were_moved(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_classes(first / "train", each=20)
    write_classes(first / "test", each=10)
    options = {"seeds": 1, "out": tmp_path / "out", **SMALL}
    compare(first, ["ce", "supcon"], **options)
    first.rename(second)
    assert compare(second, ["ce", "supcon"], pick=True, **options).picked[0] == "ce"


@pytest.mark.slow
def test_equal_minutes(photos, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "epochs"}
    found = compare(
        photos, ["ce", "supcon"], seeds=1, jobs=2, budget="minutes", minutes=0.3,
        out=tmp_path / "out", **options,
    )  # fmt: skip
    assert found.equal["budget"] == "0.3 minutes"
    assert set(found.crops.values()) == {None}
    assert all(run.epochs >= 1 and run.crops_per_second > 0 for run in found.runs)
    rows = table(tmp_path / "out" / "compare.csv")
    assert [int(row["epochs"]) for row in rows] == [run.epochs for run in found.runs]


def searched(tune, at_once=1):
    """What a search is asked for: so many trials of the learning rate of one entry."""
    entry = SimpleNamespace(name="ce", folder="ce", options={})
    term = Terms(entry, {}, 1, (), 1, 1, SimpleNamespace(lr=0.1, options={}), "")
    planned = SimpleNamespace(terms=[term], values={}, machine=lambda *_: Machine(at_once))
    options = SimpleNamespace(budget="epochs", jobs=1, tune=tune)
    return planned, SimpleNamespace(options=options, seed=0)


def test_the_best_of_the_trials_is_taken(tmp_path, monkeypatch):
    """Trials are stubs: the default learning rate, then others, the validation value a function of it."""
    taken = []

    def trial(search, each):
        rate = each.suggest_float("lr", 0.01, 1.0, log=True)
        taken.append((0.9 - abs(rate - 0.3), rate))
        return taken[-1][0]

    monkeypatch.setattr(tuning._Search, "_trial", trial)
    (found,), (told,) = tuning.tuned(tmp_path, *searched(6), quiet=True)
    assert len(taken) == 6
    assert taken[0][1] == pytest.approx(0.1)
    value, rate = max(taken)
    assert found.options == {"lr": pytest.approx(rate, rel=1e-3)}
    assert f"the best on validation ({100 * value:.2f} %) of 6 trials" in told


def test_a_journal_that_cannot_be_written_ends_the_search(tmp_path, monkeypatch):
    from optuna.storages.journal import JournalFileBackend

    append = JournalFileBackend.append_logs
    calls = []

    def full(self, logs):
        calls.append(logs)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, logs)

    monkeypatch.setattr(
        tuning._Search, "_trial", lambda _, trial: trial.suggest_float("lr", 0.01, 1)
    )
    monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    with pytest.raises(OSError, match="No space"):
        tuning.tuned(tmp_path, *searched(6), quiet=True)


@pytest.mark.parametrize("tune", [2, 4])
def test_a_search_that_is_stopped_does_not_go_on_with_what_it_has(tmp_path, monkeypatch, tune):
    """Two trials at a time: Optuna drops what the last ones raise."""

    def trial(search, each):
        each.suggest_float("lr", 0.01, 1.0, log=True)
        if each.number >= tune - 2:
            search.stop.set()
            raise Stopped("stopped")
        return 0.5

    monkeypatch.setattr(tuning._Search, "_trial", trial)
    search = searched(tune, 2)
    with pytest.raises(Stopped):
        tuning.tuned(tmp_path, *search, quiet=True)


def test_a_trial_that_cannot_be_saved_ends_the_search(tmp_path, monkeypatch):
    def trial(search, each):
        if each.number == 2:
            raise SaveFailed("no room")
        return each.suggest_float("lr", 0.01, 1.0, log=True)

    monkeypatch.setattr(tuning._Search, "_trial", trial)
    with pytest.raises(SaveFailed, match="no room"):
        tuning.tuned(tmp_path, *searched(3, 2), quiet=True)


@pytest.mark.slow
@pytest.mark.timeout(
    900
)  # eight short runs, whose processes start one after the other on a loaded machine
def test_tune_gives_each_entry_as_many_trials_on_validation(photos, tmp_path):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    out = tmp_path / "out"
    found = compare(photos, ["ce", "supcon"], seeds=1, jobs=2, tune=3, out=out, **SMALL)
    storage = JournalStorage(JournalFileBackend(str(out / "tune" / "trials.journal")))
    best = {}
    for name in ("ce", "supcon"):
        study = optuna.load_study(study_name=name, storage=storage)
        assert len([trial for trial in study.trials if trial.state.is_finished()]) == 3
        assert "lr" in study.trials[0].params
        best[name] = study.best_params
    assert set(best["supcon"]) == {
        *("lr", "objective.weight", "objective.temperature", "objective.smoothing")
    }
    assert set(best["ce"]) == {"lr", "objective.smoothing"}
    for run in found.runs:
        lr = stored_settings(out / run.folder).lr
        assert lr == pytest.approx(best[run.entry]["lr"], rel=1e-3)


@pytest.mark.slow
def test_ray_runs_the_tasks_on_a_cluster_of_two_nodes(photos, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        found = compare(
            photos, ["ce", "supcon"], seeds=1, submit="ray", out=tmp_path / "out", **SMALL
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [run.state for run in found.runs] == ["finished", "finished"]
    logs = [path.read_text() for path in (tmp_path / "out" / "runs").glob("*.log")]
    assert len({log.partition("\n")[0] for log in logs}) == len(logs) == 2  # one on each node
