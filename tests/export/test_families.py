"""ONNX, torch.export and timm give nearkin's numbers on five families, read by their own runtimes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tests.export.runs import CLASSES, run_card, write_run
from tests.pictures import write_image

import nearkin
from nearkin.data.transforms import EvalSpec, eval_transform
from nearkin.errors import ExportError
from nearkin.evaluation.model import load_bundle
from nearkin.export import formats
from nearkin.export.api import export, verify

FAMILIES = {
    "resnet": {"model": "resnet10t"},
    "efficientnet": {"model": "tf_efficientnet_lite0"},
    "convnext": {"model": "convnext_atto"},
    "vit": {"model": "vit_tiny_patch16_224"},
    "mobilenet": {"model": "mobilenetv3_small_050"},
}
SIZE = 64
EMBEDDED = {"objective": "ce", "options": {"classifier": "embedding"}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for label, name in enumerate(CLASSES):
        for number in range(12):
            size = (70 + 9 * (number % 5), 90 - 7 * (number % 4))
            write_image(root / name / f"{number}.png", label, number, size=size)
    return root


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))[None]


def expected(run, photos):
    """Path -> the logarithms of the probabilities of `predict`."""
    found = {}
    for one in nearkin.predict(run, photos):
        shown = dict(one.top5)
        found[one.path] = np.log([shown[name] for name in CLASSES])
    return found


def agrees(given, logits, temperature):
    logits = logits / temperature
    wanted = np.exp(logits - logits.max())
    np.testing.assert_allclose(given, wanted / wanted.sum(), atol=1e-5)
    assert given.argmax() == wanted.argmax()


def check_onnx(folder, wanted, temperature=1.0):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    described = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(described["classes"])) == CLASSES
    assert float(described["temperature"]) == temperature
    assert json.loads(described["transform"])["resize"] == SIZE + 6
    assert described["nearkin"] == nearkin.__version__
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[3]) == ("images", "tensor(uint8)", 3)
    assert all(isinstance(side, str) for side in taken.shape[:3])
    assert (given.name, given.shape[1]) == ("probabilities", 3)

    def model(images):
        return session.run(["probabilities"], {"images": images})[0]

    check(model, wanted, temperature)


def check_torch(folder, wanted):
    program = torch.export.load(folder / "model.pt2").module()
    check(lambda images: program(torch.from_numpy(images.copy())).detach().numpy(), wanted)


def check(model, wanted, temperature=1.0):
    """One at a time, of every size, and copies of one in batches of 2 and 5."""
    for path, logits in wanted.items():
        agrees(model(pixels(path))[0], logits, temperature)
    for size in (2, 5):
        rows = model(np.repeat(pixels(path), size, axis=0))
        assert len(rows) == size
        for row in rows:
            agrees(row, logits, temperature)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "classifier"),
    [*((family, "features") for family in FAMILIES), ("mobilenet", "embedding")],
)
def test_programs_give_the_numbers_of_predict(photos, tmp_path, family, classifier):
    given = FAMILIES[family] | (EMBEDDED if classifier == "embedding" else {})
    run = write_run(tmp_path / "run", photos, size=SIZE, resize=SIZE + 6, **given)
    wanted = expected(run, photos)
    assert len({int(logits.argmax()) for logits in wanted.values()}) > 1, "a trivial model"
    for kind, checks in (("onnx", check_onnx), ("torch", check_torch)):
        found = export(run, kind)
        assert found.manifest.checked.batch_sizes == (1, 16)
        assert found.largest_difference < 1e-5
        checks(found.folder, wanted)
        assert verify(found.folder).largest_difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_timm_gives_the_same_logits(photos, tmp_path, family):
    run = write_run(tmp_path / "run", photos, size=SIZE, resize=SIZE + 6, **FAMILIES[family])
    folder = export(run, "timm").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(model) is type(timm.create_model(FAMILIES[family]["model"]))
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, SIZE, SIZE)
    assert SIZE / config["crop_pct"] == pytest.approx(SIZE + 6)
    network = load_bundle(run, torch.device("cpu")).network
    transform = eval_transform(EvalSpec(image_size=SIZE, resize=SIZE + 6, channels=3))
    images = [
        transform(torch.from_numpy(pixels(p)[0].copy()).permute(2, 0, 1))
        for p in expected(run, photos)
    ]
    batch = torch.stack(images)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        given = model((batch / 255 - mean) / std)
        torch.testing.assert_close(given, network(batch).logits, atol=1e-4, rtol=1e-4)
    assert "label_names" in model.pretrained_cfg
    if family == "resnet":
        again = write_run(tmp_path / "embedded", photos, size=SIZE, **FAMILIES[family], **EMBEDDED)
        with pytest.raises(ExportError, match="reads an embedding"):
            export(again, "timm")


def test_one_onnx_export(photos, tmp_path):
    """The fast one, with a temperature."""
    pytest.importorskip("onnxruntime")
    given = {"size": SIZE, "resize": SIZE + 6}
    wanted = expected(write_run(tmp_path / "plain", photos, **given), photos)
    run = write_run(tmp_path / "run", photos, temperature=1.7, **given)
    for path, logs in expected(run, photos).items():
        agrees(np.exp(logs), wanted[path], 1.7)
    found = export(run, "onnx")
    check_onnx(found.folder, wanted, 1.7)
    assert verify(found.folder).largest_difference < 1e-5
    assert run_card(found.folder, next(iter(wanted))).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_raw_models_take_normalised_images(photos, tmp_path, kind, monkeypatch):
    """With the weights of the ONNX model in a file of their own, as large ones are."""
    monkeypatch.setattr(formats, "LARGEST_ONNX", 0)
    run = write_run(tmp_path / "run", photos, size=SIZE, temperature=1.7)
    found = export(run, kind, raw=True)
    assert found.manifest.output == "logits"
    assert verify(found.folder).largest_difference < 1e-4
    assert run_card(found.folder, next(photos.rglob("*.png"))).shape == (1, 3)
    images = torch.rand(5, 3, SIZE, SIZE)
    given = formats.load(found.folder, kind)((images - 0.5) / 0.5)
    with torch.inference_mode():
        logits = load_bundle(run, torch.device("cpu")).network(images).logits
    assert found.manifest.mean == found.manifest.std == (0.5, 0.5, 0.5)
    torch.testing.assert_close(given.detach(), logits, atol=1e-4, rtol=1e-4)
    assert (found.folder / "model.onnx.data").is_file() == (kind == "onnx")
