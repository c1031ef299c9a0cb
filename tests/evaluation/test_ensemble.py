"""Views, ensembles and kept predictions, on real runs."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.digests import as_saved
from tests.pictures import write_image
from torchvision.transforms import v2

import nearkin
from nearkin.cli import run as command
from nearkin.data.dataset import load_dataset
from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DivergedError, ModelError
from nearkin.evaluation import ensemble as members
from nearkin.evaluation.ensemble import likelihood_weights, mixed
from nearkin.evaluation.tta import tta_views


def image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(40, 62), (40, 61), (57, 40), (40, 40)])  # slack 21, 20, ...
def test_tencrop_is_torchvisions(shape):
    spec = EvalSpec(image_size=28, resize=32, channels=3)
    views = tta_views("tencrop", spec)(image(*shape))
    resized = v2.functional.resize(image(*shape), [32], antialias=True)
    expected = v2.functional.ten_crop(resized, [28, 28])
    assert len(views) == 10
    for mine, theirs in zip(sorted(map(key, views)), sorted(map(key, expected)), strict=True):
        assert mine == theirs


def key(view):
    return tuple(view.flatten().tolist())


def test_small_images_are_enlarged_so_that_the_corners_differ():
    views = tta_views("tencrop", EvalSpec.for_size(8, 3))(image(8, 8))
    assert all(view.shape == (3, 8, 8) for view in views)
    assert len({key(view) for view in views}) == 10


def test_flip_and_none_are_the_evaluation_transform():
    spec, picture = EvalSpec.for_size(28, 3), image(50, 41)
    plain = eval_transform(spec)(picture)
    assert torch.equal(tta_views("none", spec)(picture)[0], plain)
    one, two = tta_views("flip", spec)(picture)
    assert torch.equal(one, plain)
    assert torch.equal(two, plain.flip(-1))
    with pytest.raises(ConfigError, match=r"--tta tencorp .*Did you mean tencrop"):
        tta_views("tencorp", spec)


def weights_of(probabilities, labels):
    return likelihood_weights([rows[torch.arange(len(labels)), labels] for rows in probabilities])


def test_weights_minimise_the_log_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (80,), generator=generator)
    parts = [
        (2 * torch.randn(80, 3, generator=generator) + sharp * torch.eye(3)[labels]).softmax(1)
        for sharp in (0.5, 4.0, 1.0)
    ]

    def loss(weights):
        return float(-mixed(parts, weights)[torch.arange(80), labels].log().mean())

    found = weights_of(parts, labels)
    assert sum(found) == pytest.approx(1.0)
    grid = [(a / 50, b / 50, (50 - a - b) / 50) for a in range(51) for b in range(51 - a)]
    assert loss(found) <= min(loss(weights) for weights in grid) + 1e-6
    assert max(found) > 0.4  # not simply equal
    assert weights_of([parts[0]], labels) == [1.0]
    with pytest.raises(DivergedError, match="not finite"):
        weights_of([parts[0], parts[1] * torch.nan], labels)


def test_of_equal_members_none_is_preferred_and_a_useless_one_gets_nothing():
    right = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    labels = torch.tensor([0, 1, 0])
    assert weights_of([right, right], labels) == pytest.approx([0.5, 0.5])
    assert weights_of([right, 1 - right], labels) == pytest.approx([1, 0], abs=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three small runs with the same held-out images, and one with others."""
    home = tmp_path_factory.mktemp("runs")
    common = {"images_per_class": 20, "batch_size": 16, "model": "test_resnet", "threads": 1}
    made = {}
    for name, objective, seed, epochs in (
        ("a", "ce", 0, 3),
        ("b", "supcon", 0, 2),
        ("c", "ce", 1, 2),
    ):
        options = common | {"seed": seed, "epochs": epochs, "out": home / name}
        made[name] = nearkin.train("digits", objective, **options).run
    return made


def test_a_run_finds_its_own_images_again(tmp_path):
    """They depend on its seeds, and on how many of them it took."""
    options = {"seed": 1, "split_seed": 0, "val_split": 0.2, "images_per_class": 9}
    common = {"epochs": 0, "batch_size": 16, "model": "test_resnet", "threads": 1}
    run = nearkin.train("digits", "ce", out=tmp_path / "run", **options, **common).run
    splits = load_dataset("digits", **options).splits
    with Runtime(device="cpu", precision="fp32") as runtime:
        loaded = members.load_members([run], runtime.device)
        ensemble = members.Ensemble(loaded, runtime, tta="none", workers=0, cache=False)
        for name in ("val", "train"):
            found = ensemble.predict(None, name).split
            assert names(found) == names(splits[name])


def names(split):
    return [split.images.name(row) for row in range(len(split.labels))]


def forget(*folders):
    for folder in folders:
        shutil.rmtree(folder / "cache", ignore_errors=True)


def test_an_ensemble_is_the_mean_of_the_probabilities(runs):
    forget(*runs.values())
    both = nearkin.evaluate([runs["a"], runs["c"]])
    kept = [next((runs[n] / "cache").iterdir()) for n in ("a", "c")]
    probabilities = sum(load_file(file)["probabilities"].double() for file in kept) / 2
    labels = load_dataset("digits").splits["test"].labels
    assert both.n == 360 == len(probabilities)
    assert [m.weight for m in both.members] == [0.5, 0.5]
    alone = nearkin.evaluate(runs["a"])
    assert both.members[0].top1 == alone.top1
    assert alone.members[0].cached
    predicted = probabilities.argmax(1).tolist()
    counts = {(int(row.true), int(row.predicted)): row.images for row in both.confusion}
    assert counts == Counter(zip(labels.tolist(), predicted, strict=True))
    assert both.log_loss == pytest.approx(log_loss(probabilities, labels), rel=1e-5)


def log_loss(probabilities, labels):
    return float(-np.log(probabilities.numpy()[np.arange(len(labels)), labels]).mean())


def test_each_model_runs_once(runs, monkeypatch):
    forget(*runs.values())
    looks = []
    plain = members.Evaluator.probabilities

    def counted(self, *args):
        looks.append(args)
        yield from plain(self, *args)

    monkeypatch.setattr(members.Evaluator, "probabilities", counted)
    first = nearkin.evaluate([runs["a"], runs["b"]])
    assert [m.cached for m in first.members] == [False, False]
    second = nearkin.evaluate([runs["a"], runs["b"]])
    assert [m.cached for m in second.members] == [True, True]
    assert len(looks) == 2
    assert replace(first, members=()) == replace(second, members=())
    nearkin.evaluate(runs["a"], tta="flip")
    nearkin.evaluate(runs["a"], split="val")
    nearkin.evaluate(runs["a"], cache=False)
    assert len(looks) == 5


def test_a_damaged_or_foreign_file_in_the_cache_is_no_answer(runs):
    forget(runs["a"])
    right = nearkin.evaluate(runs["a"]).top1
    (file,) = (runs["a"] / "cache").iterdir()
    good = load_file(file)["probabilities"]
    for bad in (good[:-1], good * 2, good.half(), good.log()):
        save_file({"probabilities": bad.contiguous()}, file)
        again = nearkin.evaluate(runs["a"])
        assert again.top1 == right
        assert not again.members[0].cached
        assert any(file.name in note and "made anew" in note for note in again.notes)
    file.write_bytes(b"no tensors")
    again = nearkin.evaluate(runs["a"])
    assert again.top1 == right
    assert len(again.notes) == 1
    mended = nearkin.evaluate(runs["a"])
    assert mended.members[0].cached
    assert mended.notes == ()
    # Another model of the same shape must not find what the first has said.
    weights = runs["a"] / "model.safetensors"
    kept = weights.read_bytes()
    tensors = load_file(weights)
    save_file({n: t + 0.01 if t.is_floating_point() else t for n, t in tensors.items()}, weights)
    with pytest.raises(ModelError, match="damaged, or of another run"):
        nearkin.evaluate(runs["a"])
    as_saved(runs["a"])
    assert not nearkin.evaluate(runs["a"]).members[0].cached
    weights.write_bytes(kept)
    as_saved(runs["a"])


def test_a_cache_that_cannot_be_written_is_a_note(runs):
    forget(runs["a"])
    (runs["a"] / "cache").write_text("in the way")
    result = nearkin.evaluate(runs["a"])
    assert result.n == 360
    assert any("not kept" in note for note in result.notes)
    (runs["a"] / "cache").unlink()


def test_nothing_is_kept_outside_the_run_folder(runs, tmp_path):
    forget(runs["a"])
    (runs["a"] / "cache").symlink_to(tmp_path, target_is_directory=True)
    result = nearkin.evaluate(runs["a"])
    (runs["a"] / "cache").unlink()
    assert list(tmp_path.iterdir()) == []
    assert any("is a link" in note for note in result.notes)


@pytest.fixture
def twins(tmp_path):
    """Two data sets with equal names, sizes and times of change of all files, but swapped pictures; a run on each."""
    made = []
    for shift, root in enumerate((tmp_path / "one", tmp_path / "two")):
        for part in ("train", "test"):
            for label, name in enumerate(("cat", "dog")):
                for number in range(8):
                    file = root / part / name / f"{number}.bmp"
                    write_image(file, (label ^ shift) + 2, number, size=(16, 16))
                    os.utime(file, (1_700_000_000, 1_700_000_000))
        options = {"epochs": 0, "batch_size": 8, "model": "test_resnet", "threads": 1}
        made.append(nearkin.train(root, "ce", out=tmp_path / f"run{shift}", **options).run)
    return made, (tmp_path / "one", tmp_path / "two")


def test_runs_on_other_data_of_the_same_names_are_no_ensemble(twins):
    runs, (one, _) = twins
    with pytest.raises(ConfigError, match="other images in their split test.*give DATA"):
        nearkin.evaluate(runs)
    assert nearkin.evaluate(runs, one).n == 16
    with pytest.raises(ConfigError, match="other images in their split val"):
        nearkin.evaluate(runs, one, weights="validation")


def test_other_images_of_the_same_names_and_sizes_are_not_taken_from_the_cache(twins):
    (run, _), (one, two) = twins
    said = {data: nearkin.evaluate(run, data) for data in (one, two)}
    assert not said[two].members[0].cached
    assert said[one].log_loss != said[two].log_loss
    assert nearkin.evaluate(run, one).members[0].cached
    picture = two / "test" / "cat" / "0.bmp"
    picture.write_bytes((one / "test" / "cat" / "0.bmp").read_bytes())  # the same size, a new time
    assert not nearkin.evaluate(run, two).members[0].cached


def test_a_run_given_twice_is_a_slip(runs):
    with pytest.raises(ConfigError, match="given twice"):
        nearkin.evaluate([runs["a"], runs["b"], runs["a"] / ".." / runs["a"].name])


def test_data_are_read_once_for_all_members(runs, monkeypatch):
    read = []
    plain = members.load_for_evaluation
    monkeypatch.setattr(
        members, "load_for_evaluation", lambda *a, **k: read.append(a) or plain(*a, **k)
    )
    nearkin.evaluate([runs["a"], runs["b"], runs["c"]], "digits")
    assert len(read) == 1


def test_validation_chooses_the_weights_and_nothing_else(runs):
    forget(*runs.values())
    result = nearkin.evaluate([runs["a"], runs["b"]], weights="validation")
    said = {143: [], 360: []}
    for name in ("a", "b"):
        for file in (runs[name] / "cache").iterdir():
            probabilities = load_file(file)["probabilities"]
            said[len(probabilities)].append(probabilities)
    splits = load_dataset("digits", seed=0).splits
    expected = weights_of(said[143], torch.from_numpy(splits["val"].labels))
    assert [m.weight for m in result.members] == pytest.approx(expected)
    wanted = log_loss(mixed(said[360], expected), splits["test"].labels)
    assert result.log_loss == pytest.approx(wanted, rel=1e-5)
    equal = log_loss(mixed(said[360], [0.5, 0.5]), splits["test"].labels)
    assert wanted != pytest.approx(equal, rel=1e-3), "otherwise this test tells nothing"
    with pytest.raises(
        ConfigError, match="other images in their split val.*or use --weights equal"
    ):
        nearkin.evaluate([runs["a"], runs["c"]], weights="validation")
    assert result.notes == ()
    same = nearkin.evaluate([runs["a"], runs["b"]], weights="validation", split="val")
    assert any("chosen on this very split" in note for note in same.notes)


def test_members_with_other_classes_are_refused_and_with_another_order_are_mapped(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["a"], other)
    description = json.loads((other / "model.json").read_text())
    description["spec"]["classes"] = [*map(str, range(9)), "ten"]
    (other / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=r"differs in 9, ten"):
        nearkin.evaluate([runs["a"], other])
    order = [3, 1, 2, 0, 4, 5, 6, 7, 8, 9]
    description["spec"]["classes"] = [str(place) for place in order]
    (other / "model.json").write_text(json.dumps(description))
    tensors = load_file(other / "model.safetensors")
    for name in ("heads.classifier.weight", "heads.classifier.bias"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, other / "model.safetensors")
    as_saved(other)
    both = nearkin.evaluate([runs["a"], other])
    assert both.members[0].top1 == both.members[1].top1 == both.top1


def test_views_are_averaged(runs):
    plain, flipped, ten = (nearkin.evaluate(runs["a"], tta=t) for t in ("none", "flip", "tencrop"))
    assert plain.n == flipped.n == ten.n
    assert len({plain.log_loss, flipped.log_loss, ten.log_loss}) == 3


def test_the_command_line(runs, capsys, tmp_path):
    a, b = str(runs["a"]), str(runs["b"])
    assert command(["evaluate", a, b, "--tta", "flip", "--weights", "validation"]) == 0
    text = capsys.readouterr().out
    assert "weight" in text
    assert text.count(f"\n{a} ") == 1
    assert command(["evaluate", a, "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"][0]["run"] == a
    for words, code, part in (
        ([a, b, str(tmp_path / "nothing")], 3, "nothing"),
        ([a, str(tmp_path / "x"), str(tmp_path / "y")], 2, "only one word can be DATA"),
        ([a, "--tta", "ten"], 2, "tencrop"),
        ([a, "--weights", "best"], 2, "equal, validation"),
        ([str(tmp_path / "none"), a], 3, "none"),
    ):
        assert command(["evaluate", *words]) == code
        assert part in capsys.readouterr().err


def test_no_run_is_a_configuration_error():
    with pytest.raises(ConfigError, match="at least one run"):
        nearkin.evaluate([])
