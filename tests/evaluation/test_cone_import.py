"""The CoNe authors' checkpoint: the same logits as an independent network, and nothing but a whole run folder."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
import torch
import yaml
from PIL import Image
from tests.evaluation.cone_checkpoint import Published, pictures, save
from tests.pictures import write_classes
from torchvision.transforms.v2 import functional as pixels

import nearkin
from nearkin.cli import run
from nearkin.errors import DataError
from nearkin.evaluation.model import ModelSpec, build, load_bundle
from nearkin.evaluation.predict import predict
from nearkin.files import SaveFailed
from nearkin.network import load_weights

CPU = torch.device("cpu")
NAMES = ("wasp", "ant", "cat", "bee", "dog", "cow", "eel")  # not sorted


@pytest.fixture(scope="module")
def published():
    return Published()


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """A run folder of the small checkpoint with class names."""
    home = tmp_path_factory.mktemp("imported")
    (home / "names.txt").write_text("\r\n".join(NAMES) + "\r\n", encoding="utf-8-sig")
    words = [save(home / "cone.pth", published.tensors()), "--out", home / "run"]
    assert run(["import-cone", *map(str, words), "--classes", str(home / "names.txt")]) == 0
    return home / "run"


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def logits(folder, images):
    return load_bundle(folder, CPU).network(images).logits


def test_a_stop_signal_leaves_no_folder(published, tmp_path, monkeypatch, capsys):
    def save_bundle(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("nearkin.evaluation.model.save_bundle", save_bundle)
    file = save(tmp_path / "cone.pth", published.tensors())
    assert run(["import-cone", str(file), "--out", str(tmp_path / "run")]) == 75
    assert capsys.readouterr().err == "nearkin: stopped: interrupted.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", ["module.", "", "module._orig_mod."])
def test_the_logits_are_those_of_the_published_network(published, tmp_path, capsys, prefix):
    file = save(tmp_path / "cone.pth", published.tensors(prefix))
    assert run(["import-cone", str(file), "--out", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "run": str(tmp_path / "run"),
        "test_top1": None,
        "model": "resnet18",
        "classes": 7,
    }
    found = logits(tmp_path / "run", pictures(4))
    wanted = published(pictures(4))
    assert found.shape == (4, 7)
    assert difference(found, wanted) <= 1e-5
    assert wanted.std(0).max() > 1e-3 * wanted.abs().max(), "images must matter"
    assert load_bundle(tmp_path / "run", CPU).classes == tuple("0123456")


def test_the_bias_before_batchnorm_matters(published, imported):
    """What a name-by-name copy would lose, so that the equality above says something."""
    other = Published()
    other.load_state_dict(published.state_dict())
    torch.nn.init.zeros_(other.head.head[0].bias)
    assert difference(logits(imported, pictures(4)), other(pictures(4))) > 1e-2


@pytest.mark.parametrize(
    ("depth", "sizes"),
    [
        (34, (64, 8, 3)),
        (50, (4096, 256, 1000)),
        pytest.param(101, (8, 4, 2), marks=pytest.mark.slow),
        pytest.param(152, (8, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_every_depth_is_recognised(tmp_path, depth, sizes):
    whole = Published(depth, *sizes)
    student = {n: t for n, t in whole.tensors().items() if "encoder_k" not in n}
    file = save(tmp_path / "cone.pth", student)
    assert run(["import-cone", str(file), "--out", str(tmp_path / "run")]) == 0
    bundle = load_bundle(tmp_path / "run", CPU)
    assert bundle.description.spec.model == f"resnet{depth}"
    assert bundle.classes[1] == "1".zfill(len(str(sizes[2] - 1)))
    assert sorted(bundle.classes) == list(bundle.classes)
    assert difference(logits(tmp_path / "run", pictures(2)), whole(pictures(2))) <= 1e-5


def test_counters_may_be_missing_and_halves_are_read(published, tmp_path):
    tensors = published.tensors()
    plain = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    rounded = {n: t.half() if t.is_floating_point() else t for n, t in plain.items()}
    file = save(tmp_path / "cone.pt", rounded)
    assert run(["import-cone", str(file), "--out", str(tmp_path / "run")]) == 0
    other = Published()
    own = {n.removeprefix("module.encoder_q."): t.float() for n, t in rounded.items()}
    other.load_state_dict({n: t for n, t in own.items() if n in other.state_dict()}, strict=False)
    assert difference(logits(tmp_path / "run", pictures(3)), other(pictures(3))) <= 1e-5


def write_pictures(folder, images, names):
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / name / f"{number}.png")
    return folder


def varied(count):
    """Images of another size than the network's, no two alike."""
    noise = pictures(count, side=9)
    return [pixels.resize(image, [270, 300]) for image in noise]


def test_predict_gives_the_probabilities_of_the_published_network(published, imported, tmp_path):
    images = varied(3)
    folder = write_pictures(tmp_path / "files", images, ["x"] * 3)
    wanted = published(torch.stack([published.view(image) for image in images])).softmax(1)
    predictions = list(predict(imported, [folder], device="cpu"))
    assert len(predictions) == 3
    for one, row in zip(predictions, wanted, strict=True):
        assert one.label == NAMES[int(row.argmax())]
        for name, probability in one.top5:
            assert probability == pytest.approx(float(row[NAMES.index(name)]), rel=1e-4, abs=1e-7)


def test_evaluate_maps_classes_by_name_in_any_order(tmp_path):
    """Half of the images lie in the folder of the class that the published network says, half in another."""
    images = varied(12)
    network = Published(seed=3)
    views = torch.stack([network.view(image) for image in images])
    network.fc.bias.data -= network(views).mean(0)  # so that the answers differ
    answers = [NAMES[c] for c in network(views).argmax(1).tolist()]
    assert len(set(answers)) >= 3
    labels = [a if i % 2 else NAMES[NAMES.index(a) - 1] for i, a in enumerate(answers)]
    data = write_pictures(tmp_path / "data", images, labels)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    file = save(tmp_path / "cone.pth", network.tensors())
    argv = ["import-cone", str(file), "--out", str(tmp_path / "run")]
    assert run([*argv, "--classes", str(tmp_path / "names.json")]) == 0
    result = nearkin.evaluate(tmp_path / "run", data, device="cpu")
    assert (result.n, result.top1) == (12, 0.5)
    pairs = Counter(zip(labels, answers, strict=True))
    assert {(row.true, row.predicted): row.images for row in result.confusion} == pairs


def test_its_own_data_are_named_but_not_made_up(imported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", str(imported)]) == 3
    assert "imagenet" in capsys.readouterr().err
    assert run(["train", "--resume", str(imported)]) == 0
    assert "finished" in capsys.readouterr().err


def test_nothing_is_said_of_what_the_authors_did(imported, tmp_path, monkeypatch):
    """A folder of that name may hold other images, and the licence is theirs."""
    from nearkin.export.api import export

    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "imagenet", NAMES, each=10)
    found = nearkin.evaluate(imported, "imagenet")
    assert (found.split, found.n) == ("test", 10 * len(NAMES))
    assert not any("was trained on" in note for note in found.notes)
    with pytest.raises(DataError, match="with other images"):
        nearkin.evaluate(imported)
    made = export(imported, "torch", data="imagenet", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert made is not None
    assert "imported by nearkin" in card
    assert "Trained on unknown data" in card
    assert "licence is not known here and holds for this model" in card
    config = yaml.safe_load((imported / "config.yaml").read_text())
    assert config["objective"]["classifier"] == "embedding"
    assert config["objective"]["bank"] == "auto"


def test_training_can_start_from_it(imported):
    options = {"hidden": 96, "embedding": 16, "bank": 8, "topk": 2, "warmup_steps": 0}
    spec = ModelSpec(
        model="resnet18",
        channels=3,
        image_size=64,
        stem="default",
        objective="cone",
        options=options,
        classes=("a", "b", "c"),
    )
    network = build(spec).network
    report = load_weights(network, imported)
    assert report.missing == report.unexpected == ()
    assert set(report.mismatched) == {"heads.classifier.weight", "heads.classifier.bias"}
    theirs = load_bundle(imported, CPU).network.state_dict()
    assert torch.equal(
        network.state_dict()["backbone.conv1.weight"], theirs["backbone.conv1.weight"]
    )


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


STUDENT = "module.encoder_q."
HEAD = STUDENT + "head.head.0.weight"
DEFECTS = {
    "no first bias": (
        lambda t: without(t, STUDENT + "head.head.0.bias"),
        "head.head.0.bias is missing",
    ),
    "no classifier": (lambda t: without(t, STUDENT + "fc.weight"), "fc.weight is missing"),
    "no head": (lambda t: without(t, HEAD), "head.head.0.weight is missing"),
    "no statistics": (
        lambda t: without(t, STUDENT + "net.bn1.running_var"),
        "bn1.running_var is missing",
    ),
    "a third layer": (
        lambda t: t | {STUDENT + "head.head.4.weight": torch.ones(3)},
        "head.4.weight is unexpected",
    ),
    "a classifier inside": (
        lambda t: t | {STUDENT + "net.fc.weight": torch.ones(3, 512)},
        "net.fc.weight is unexpected",
    ),
    "another part": (
        lambda t: t | {STUDENT + "neck.weight": torch.ones(3)},
        "encoder_q.neck.weight",
    ),
    "another model": (lambda t: t | {"module.decoder.weight": torch.ones(3)}, "decoder.weight"),
    "a block too few": (
        lambda t: {n: v for n, v in t.items() if ".layer3.1." not in n},
        "2, 2, 1, 2 blocks",
    ),
    "a wider layer": (
        lambda t: t | {STUDENT + "net.bn1.weight": torch.ones(65)},
        "shape 65 instead of 64",
    ),
    "a head for other features": (
        lambda t: t | {HEAD: torch.ones(96, 99)},
        "96x99 instead of 96x512",
    ),
    "a head without width": (lambda t: t | {HEAD: torch.ones(0, 512)}, "shape 0x512"),
    "a classifier of one row": (lambda t: t | {STUDENT + "fc.weight": torch.ones(16)}, "shape 16"),
    "a classifier for another embedding": (
        lambda t: t | {STUDENT + "fc.weight": torch.ones(7, 17)},
        "instead of",
    ),
    "whole numbers": (
        lambda t: t | {STUDENT + "net.bn1.bias": torch.ones(64, dtype=torch.long)},
        "torch.int64",
    ),
    "nan": (lambda t: t | {STUDENT + "net.bn1.bias": torch.full((64,), torch.nan)}, "not finite"),
    "an infinite bias": (
        lambda t: t | {STUDENT + "head.head.0.bias": torch.full((96,), torch.inf)},
        "not finite",
    ),
    "too large for float32": (
        lambda t: t | {STUDENT + "fc.bias": torch.full((7,), 1e300, dtype=torch.float64)},
        "not finite",
    ),
    "a negative variance": (
        lambda t: t | {STUDENT + "net.bn1.running_var": torch.full((64,), -1.0)},
        "negative variance",
    ),
    "a name spelt twice": (
        lambda t: t | {"encoder_q.fc.bias": torch.ones(7)},
        "differ in a prefix",
    ),
    "another program's weights": (
        lambda t: {
            n.removeprefix(STUDENT + "net."): v for n, v in t.items() if ".net." in n and "_q" in n
        },
        "no entry encoder_q.*",
    ),
    "no tensors": (lambda t: {"encoder_q.fc": 3}, "no state dict"),
}


def refused(capsys, code, *words, argv):
    capsys.readouterr()
    assert run(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("nearkin: error: ")
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named_and_nothing_is_written(published, tmp_path, capsys, defect):
    change, words = DEFECTS[defect]
    file = save(tmp_path / "cone.pth", change(published.tensors()))
    argv = ["import-cone", str(file), "--out", str(tmp_path / "run")]
    refused(capsys, 4, "cone.pth", words, argv=argv)
    assert os.listdir(tmp_path) == ["cone.pth"]


def test_code_in_the_file_is_not_run(published, tmp_path, capsys):
    marker, file = tmp_path / "marker", tmp_path / "cone.pth"
    torch.save({"model": published.tensors(), "args": Payload(marker)}, file)
    refused(
        capsys, 4, "could run code", argv=["import-cone", str(file), "--out", str(tmp_path / "run")]
    )
    assert os.listdir(tmp_path) == ["cone.pth"]
    torch.load(file, weights_only=False)
    assert marker.exists(), "the payload must work where it is let"


def test_other_files_and_folders_are_refused(published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "cone.pth", published.tensors())
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "cone.txt").write_text("no checkpoint")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    (tmp_path / "six.txt").write_text("\n".join(NAMES[:6]))
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n")
    (tmp_path / "gap.txt").write_text("cat\n\ndog\n")
    (tmp_path / "map.json").write_text('{"0": "cat"}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    before = sorted(os.listdir(tmp_path))
    good = ["import-cone", "cone.pth", "--out", "run"]
    refused(capsys, 2, "Import which file", argv=["import-cone"])
    refused(capsys, 2, "taken", "--out", argv=["import-cone", "cone.pth", "--out", "taken"])
    refused(capsys, 2, "--outt", "--out?", argv=["import-cone", "cone.pth", "--outt", "run"])
    refused(
        capsys, 4, "none.pth", "does not exist", argv=["import-cone", "none.pth", "--out", "run"]
    )
    refused(capsys, 4, "text.pth", "damaged", argv=["import-cone", "text.pth", "--out", "run"])
    refused(capsys, 4, "cone.txt", ".pth", argv=["import-cone", "cone.txt", "--out", "run"])
    refused(capsys, 4, "6 names", "7 classes", argv=[*good, "--classes", "six.txt"])
    refused(capsys, 2, "cat at positions 1 and 3", argv=[*good, "--classes", "twice.txt"])
    refused(capsys, 2, "position 2", argv=[*good, "--classes", "gap.txt"])
    refused(capsys, 2, "map.json", "list", argv=[*good, "--classes", "map.json"])
    refused(capsys, 2, "numbers.json", "strings", argv=[*good, "--classes", "numbers.json"])
    refused(capsys, 2, "latin.txt", "UTF-8", argv=[*good, "--classes", "latin.txt"])
    refused(capsys, 2, "none.txt", "No such file", argv=[*good, "--classes", "none.txt"])
    refused(
        capsys, 2, "cone.txt", "--out", argv=["import-cone", "cone.pth", "--out", "cone.txt/run"]
    )
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "taken") == ["precious"]


def test_a_full_disk_leaves_no_half_folder(published, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise SaveFailed("model.json could not be written: the disk is full")

    monkeypatch.setattr("nearkin.evaluation.model.save_bundle", full)
    file = save(tmp_path / "cone.pth", published.tensors())
    assert run(["import-cone", str(file), "--out", str(tmp_path / "run")]) == 75
    assert os.listdir(tmp_path) == ["cone.pth"]


def test_help_and_the_default_folder(published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["import-cone", "--help"]) == 0
    assert "--classes" in capsys.readouterr().out
    save(tmp_path / "best.pth", published.tensors())
    assert run(["import-cone", "best.pth"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("best-cone-")
    assert str(folder.relative_to(tmp_path)) in capsys.readouterr().out
