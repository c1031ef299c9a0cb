"""nearkin export: agreement with predict, refusals, and bundles that verify themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.export.runs import CLASSES, run_card, write_run
from tests.pictures import write_image

import nearkin
from nearkin.cli import run as command
from nearkin.errors import ConfigError, DataError, ExportError, ModelError
from nearkin.evaluation.model import load_bundle
from nearkin.evaluation.own_data import Origin, place_of
from nearkin.export import agreement, api, formats
from nearkin.export.api import export, verify
from nearkin.export.module import Exported


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """20 images of each of three classes, of 4 sizes."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for label, name in enumerate(("cat", "dog", "eel")):
        for number in range(20):
            size = (24 + 7 * (number % 4), 40 - 5 * (number % 4))
            write_image(root / name / f"{number}.png", label, number, size=size)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    return write_run(tmp_path_factory.mktemp("run") / "run", photos, size=24, resize=28)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, run):
    """The cheapest bundle."""
    return export(run, "timm", out=tmp_path_factory.mktemp("bundle") / "timm").folder


@pytest.fixture
def copy(tmp_path, bundle):
    return shutil.copytree(bundle, tmp_path / "copy")


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def test_timm_gives_the_probabilities_of_predict(run, photos, bundle):
    """With timm's own loader and transform, up to Pillow's rounding of pixels."""
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 24, 24)
    transform = timm.data.create_transform(**config, is_training=False)
    for one in nearkin.predict(run, photos / "dog"):
        pixels = transform(Image.open(one.path).convert("RGB"))[None]
        with torch.inference_mode():
            (probabilities,) = model(pixels).softmax(1).tolist()
        shown = dict(zip(CLASSES, probabilities, strict=True))
        assert shown == pytest.approx(dict(one.top5), abs=0.02)


def test_the_lines_of_the_card_run(bundle, photos, monkeypatch):
    monkeypatch.chdir(bundle)
    assert run_card(bundle, next((photos / "cat").iterdir())).shape == (1, 3)


def test_a_float64_network_stays_one(run):
    bundle = load_bundle(run, torch.device("cpu"))
    bundle.network.double()
    images = torch.randint(256, (2, 24, 24, 3), dtype=torch.uint8)
    Exported(bundle, raw=False)
    assert bundle.network(images.permute(0, 3, 1, 2)).logits.dtype == torch.float64


def test_a_photo_that_is_stored_turned_is_upright_for_the_card(run, tmp_path):
    """The lines of the card, on a photo and on the same with an EXIF orientation."""
    folder = export(run, "torch", out=tmp_path / "torch").folder
    photo = Image.effect_noise((40, 30), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "upright.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    shown = [run_card(folder, tmp_path / name) for name in ("upright.png", "turned.png")]
    assert shown[0].numpy()[0] == pytest.approx(shown[1].numpy()[0])  # no graph hangs on them
    assert nearkin.load(run)(tmp_path / "turned.png").probability == pytest.approx(
        max(shown[1].tolist()[0]), abs=1e-5
    )


def test_a_package_by_another_name_has_a_version(monkeypatch):
    monkeypatch.setattr(api, "version", missing)
    assert api._version("numpy") == np.__version__


def missing(name):
    raise PackageNotFoundError(name)


def test_what_a_person_reads(run, photos, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert command(["export", str(run), "--format", "timm", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "6 val images at batch sizes 1 and 16: top-1 agrees on 100 %" in shown
    assert f"nearkin export --verify {out}" in shown
    assert command(["export", "--verify", str(out), "--json"]) == 0
    seen = capsys.readouterr()
    record = json.loads(seen.out)
    assert (record["format"], record["run"]) == ("timm", None)
    assert record["files"] == ["README.md", "check.safetensors", "config.json", "model.safetensors"]
    assert record["largest_difference"] < 1e-5
    assert "only as trustworthy as its source" in seen.err
    assert left_over(tmp_path / "deep") == ["out"]


def test_files_have_the_usual_permissions(bundle):
    modes = {oct(path.stat().st_mode & 0o777) for path in bundle.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("damage", ["flip", "missing", "link", "card"])
def test_a_changed_file_is_found(copy, damage, capsys):
    path = copy / ("README.md" if damage == "card" else "model.safetensors")
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "card":
        path.write_text("other")
    else:
        path.rename(copy.parent / "elsewhere")
    if damage == "link":
        path.symlink_to(copy.parent / "elsewhere")
    assert command(["export", "--verify", str(copy)]) == 5
    assert path.name in capsys.readouterr().err


def test_a_changed_model_is_found_though_its_checksum_fits(copy):
    from nearkin.export.manifest import read_manifest, write_manifest

    weights = load_file(copy / "model.safetensors")
    weights["fc.bias"] = weights["fc.bias"].flip(0)
    save_file(weights, copy / "model.safetensors")
    write_manifest(copy, read_manifest(copy))
    with pytest.raises(ExportError, match=r"another class than nearkin|no rounding"):
        verify(copy)


def test_check_inputs_that_the_model_cannot_take(copy):
    from nearkin.export.manifest import read_manifest, write_manifest

    tensors = load_file(copy / "check.safetensors")
    tensors["inputs.0"] = tensors["inputs.0"][:, :1].contiguous()
    save_file(tensors, copy / "check.safetensors")
    write_manifest(copy, read_manifest(copy))
    with pytest.raises(ExportError, match=r"fails for images \[3, 1, 24, 24\]"):
        verify(copy)


def test_a_file_that_is_no_part_of_the_bundle_is_named(copy):
    (copy / "extra\n.bin").write_text("")
    assert "extra\\n.bin" in verify(copy).notes[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"files": {"../run": "0"}}, "does not list"),
        ({"files": {"model.safetensors": "0", "check.safetensors": "0"}}, "not list config.json"),
        ({"+": {"../run/model.json": "0"}}, "outside of it"),
        ({"+": {"..": "0"}}, "outside of it"),
        ({"+": {"": "0"}}, "outside of it"),
        ({"version": 99}, "upgrade"),
        ({"kind": "pickle"}, "no manifest of nearkin"),
        ({"temperature": 0}, "no manifest of nearkin"),
        ({"classes": ["a", "b"]}, "does not fit the manifest"),
        ([], "no manifest of nearkin"),
        ("[" * 10000, "no manifest of nearkin"),
    ],
)
def test_a_hostile_manifest(copy, change, text):
    path = copy / "manifest.json"
    record = json.loads(path.read_text())
    if isinstance(change, str):
        path.write_text(change)
    else:
        if "+" in change:
            change = {"files": record["files"] | change["+"]}
        path.write_text(json.dumps(record | change if change else []))
    with pytest.raises(ExportError, match=text):
        verify(copy)


def test_nothing_is_loaded_before_the_checksums_agree(copy, monkeypatch):
    monkeypatch.setattr(formats, "load", lambda *_: pytest.fail("loaded"))
    (copy / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="has changed"):
        verify(copy)


@pytest.mark.parametrize(
    "defect",
    ["other classes", "shifted", "not a number", "fixed batch", "fails at 16"],
)
def test_a_wrong_model_is_not_kept(run, tmp_path, monkeypatch, defect):
    """Planted defects of exporters."""
    real = formats.load

    def wrong(*arguments):
        model = real(*arguments)
        defects = {
            "other classes": lambda images: model(images).flip(1),
            "shifted": lambda images: model(images) + 0.01,
            "not a number": lambda images: model(images) / 0,
            "fixed batch": lambda images: model(images[:1]),
            "fails at 16": lambda images: model(images) * (1.02 if len(images) > 1 else 1),
        }
        return defects[defect]

    monkeypatch.setattr(formats, "load", wrong)
    with pytest.raises(ExportError, match=r"another class|no rounding"):
        export(run, "timm", out=tmp_path / "out")
    assert left_over(tmp_path) == []


def test_an_exporter_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no such operator\nin two lines")

    monkeypatch.setattr(torch.export, "export", fail)
    words = ["export", str(run), "--format", "torch", "--out", str(tmp_path / "out")]
    assert command(words) == 5
    line = capsys.readouterr().err.splitlines()[-1]
    assert "torch cannot export test_resnet (ValueError: no such operator)" in line
    assert left_over(tmp_path) == []


def test_an_interrupt_leaves_nothing(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(agreement, "agree_on", stop)
    with pytest.raises(KeyboardInterrupt):
        export(run, "timm", out=tmp_path / "out")
    assert left_over(tmp_path) == []


def test_ties_are_no_disagreement():
    expected = torch.tensor([[0.5, 0.5 - 1e-6], [0.7, 0.3]])
    assert agreement.compare(torch.tensor([[0.5, 0.5 + 1e-6], [0.7, 0.3]]), expected).wrong == 0
    assert agreement.compare(torch.tensor([[0.4, 0.6], [0.3, 0.7]]), expected).wrong == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"objective": "arcface"}, "no linear layer"),
        ({"stem": "small"}, "--stem default"),
        (
            {"objective": "ce", "options": {"classifier": "embedding"}},
            "reads an embedding, not the features of test_resnet",
        ),
    ],
)
def test_what_timm_cannot_hold_is_refused_with_the_reason(photos, tmp_path, given, text):
    run = write_run(tmp_path / "run", photos, size=24, **given)
    with pytest.raises(ExportError, match=text):
        export(run, "timm")
    assert left_over(run) == ["config.yaml", "model.json", "model.safetensors"]


def test_a_hostile_run_makes_a_harmless_card(tmp_path):
    names = ("<script>alert(1)</script>", "a|b\n# c", "[x](javascript:1)")
    root = tmp_path / "da<b>ta"
    for label, name in enumerate(names):
        for number in range(4):
            write_image(root / name.replace("/", "-") / f"{number}.png", label, number)
    classes = tuple(name.replace("/", "-") for name in names)
    worst = {"true": classes[0], "predicted": classes[1], "images": 2}
    metrics = {**write_run.__kwdefaults__["metrics"], "most_confused": worst}
    run = write_run(tmp_path / "run", root, classes=classes, metrics=metrics)
    text = (export(run, "timm").folder / "README.md").read_text()
    assert "<" not in text
    assert "](" not in text
    assert "\n# c" not in text
    assert "a\\|b" in text
    assert "keep their notice" not in text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "random weights"),
        ({"pretrained": True}, "timm's pretrained weights of test"),
        ({"weights": "w.safetensors"}, "a file of weights"),
        ({"pretrained": True, "model": "tf_efficientnet_lite0"}, "Apache License 2.0"),
    ],
)
def test_the_card_names_the_licence_of_the_first_weights(config, text):
    from nearkin.config import RunConfig
    from nearkin.export.card import origin

    given = RunConfig(data="digits", **({"model": "test_resnet"} | config))
    assert text in origin(given, given.model, imported=False).sentence.replace("\\", "")


def test_a_grey_model_without_validation_images(tmp_path):
    """Checked on test images; a run of an older nearkin has no temperature."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog", "eel")):
        for number in range(4):
            for split in ("train", "test"):
                path = root / split / name / f"{number}.png"
                write_image(path, label, number + 10 * (split == "test"), mode="L")
    run = write_run(tmp_path / "run", root, channels=1, config={"val_split": 0})
    found = export(run, "timm")
    assert found.folder == run / "export-timm"
    assert (found.manifest.checked.split, found.manifest.checked.images) == ("test", 12)
    assert found.manifest.temperature == 1
    assert "No temperature was fitted" in (found.folder / "README.md").read_text()
    verify(found.folder)
    assert run_card(found.folder, path).shape == (1, 3)


def test_validation_images_that_cannot_be_told_any_more_are_not_compared_on(
    photos, tmp_path, monkeypatch
):
    """The folder gained a photo: another part would be held out, and trained images called validation images."""
    run = write_run(tmp_path / "run", photos, size=24, config={"val_split": 0.2})
    found = export(run, "timm", out=tmp_path / "before")
    assert found.manifest.checked.split == "val"
    origin = Origin("other", "", place_of(str(photos)))
    monkeypatch.setattr("nearkin.export.api.stored_origin", lambda _: origin)
    found = export(run, "timm", out=tmp_path / "after")
    assert (found.manifest.checked.split, found.manifest.checked.images) == ("train", 60)


def test_a_run_whose_images_are_gone(photos, tmp_path):
    """--data names others; its labels are not compared."""
    run = write_run(tmp_path / "run", tmp_path / "gone", size=24)
    with pytest.raises(DataError, match=r"gone' are missing.* with --data"):
        export(run, "timm")
    found = export(run, "timm", data=photos)
    assert (found.manifest.checked.split, found.manifest.checked.images) == ("test", 60)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"no config.yaml .* with --data"):
        export(run, "timm", out=tmp_path / "out")
    assert (
        "not known"
        in (export(run, "timm", data=photos, out=tmp_path / "out").folder / "README.md").read_text()
    )


def test_bad_words(run, photos, tmp_path):
    with pytest.raises(ConfigError, match="exists"):
        export(run, "timm", out=photos)
    with pytest.raises(DataError, match="missing"):
        export(run, "timm", data=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="does not exist"):
        export(tmp_path / "nowhere", "timm")
    for folder, text in ((tmp_path, "no exported model"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(ExportError, match=text):
            verify(folder)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("", 2, "Export which run?"),
        ("run", 2, "--format onnx, timm or torch"),
        ("run --format onxx", 2, "Did you mean onnx?"),
        ("nowhere --format onnx", 4, "The run nowhere does not exist"),
        ("run --format onnx --out run", 2, "exists; choose another --out"),
        ("run --format onnx", 2, "uv sync --extra export"),
        ("--verify nowhere", 5, "nowhere is no folder"),
        ("--verify run", 5, "no exported model"),
        ("run --verify run", 2, "--verify takes a folder and nothing else"),
    ],
)
def test_bad_words_are_refused_without_torch(tmp_path, words, code, text):
    """In a process of its own, where the packages of the extra are missing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text("{}")
    program = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n.startswith('onnx') else real(n, *a)\n"
        "from nearkin.cli import run\n"
        "code = run(['export', *sys.argv[1:]])\n"
        "print(code, [m for m in ('torch', 'timm', 'PIL', 'onnx') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr
    assert text in done.stderr
