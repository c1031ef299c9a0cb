"""Metrics are exact: odd sizes, more processes than images, nothing padded, nothing dropped."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.pictures import write_image
from tests.processes import finish, ranks, start

from nearkin.cli import run
from nearkin.data import loader
from nearkin.data.dataset import load_dataset
from nearkin.data.transforms import EvalSpec
from nearkin.distributed import Runtime
from nearkin.errors import ModelError
from nearkin.evaluation import evaluator as evaluator_module
from nearkin.evaluation.evaluate import evaluate
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.frozen import frozen_features
from nearkin.evaluation.model import load_bundle, read_description
from nearkin.evaluation.predict import predict


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model of digits after no step at all: 0 epochs give a run that can be used."""
    folder = tmp_path_factory.mktemp("untrained") / "run"
    words = [
        "train",
        "digits",
        "--epochs",
        "0",
        "--model",
        "test_resnet",
        "--threads",
        "1",
        "--quiet",
    ]
    assert run([*words, "--out", str(folder), "--objective", "cone", "--objective.bank", "40"]) == 0
    return folder


def measured(folder, data, split, out, tta):
    """Evaluate in each process; the first writes the result. No cache, which would replace the other processes."""
    import os

    torch.set_num_threads(1)
    result = evaluate(folder, data, split=split, tta=tta, cache=False)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(result.to_dict() | {"confusion": result.confusion}))


def on(processes, folder, data, split, tmp_path, tta="none"):
    out, log = tmp_path / f"{processes}.json", tmp_path / "log"
    environments = ranks(processes) if processes > 1 else [{}]
    started = [
        start(measured, folder, data, split, out, tta, env=env, log=log) for env in environments
    ]
    assert set(finish(*started)) == {0}, log.read_text()
    return json.loads(out.read_text())


@pytest.mark.parametrize(("tta", "processes"), [("none", 3), ("tencrop", 2)])
def test_any_number_of_processes_gives_the_same_metrics(untrained, tmp_path, tta, processes):
    one = on(1, untrained, None, "val", tmp_path, tta)
    three = on(processes, untrained, None, "val", tmp_path, tta)
    assert not one["members"][0]["cached"]
    assert not three["members"][0]["cached"]
    assert one["n"] == three["n"] == 143
    assert one["confusion"] == three["confusion"]
    assert one["log_loss"] == pytest.approx(three["log_loss"], rel=1e-6)


def test_more_processes_than_images(untrained, tmp_path):
    for name in ("3", "7"):
        write_image(tmp_path / "few" / name / "a.png", int(name), size=(8, 8), mode="L")
    result = on(3, untrained, str(tmp_path / "few"), None, tmp_path)
    assert (result["n"], result["split"]) == (2, "test")


def test_predict_agrees_with_evaluate(untrained, tmp_path):
    files = [
        write_image(tmp_path / "few" / name / f"{n}.png", int(name), n, size=(11, 9), mode="L")
        for name in ("1", "2", "5")
        for n in range(3)
    ]
    result = evaluate(untrained, tmp_path / "few")
    predictions = list(predict(untrained, files))
    right = sum(one.label == file.parent.name for one, file in zip(predictions, files, strict=True))
    assert result.n == 9
    assert result.top1 == pytest.approx(right / 9)
    for tta in ("flip", "tencrop"):
        viewed = list(predict(untrained, files, tta=tta))
        right = sum(one.label == f.parent.name for one, f in zip(viewed, files, strict=True))
        assert evaluate(untrained, tmp_path / "few", tta=tta).top1 == pytest.approx(right / 9)
        assert viewed[0].probability != predictions[0].probability
    again = next(predict(untrained, [files[4]]))
    assert again.probability == pytest.approx(predictions[4].probability, rel=1e-5)


@pytest.fixture
def counted(untrained):
    """A network that records the images of each pass, an Evaluator, and a split that records the rows that are read."""
    runtime = Runtime(device="cpu", precision="fp32")
    bundle = load_bundle(untrained, runtime.device)
    split = load_dataset("digits").splits["val"].take(np.arange(37))
    passes, read = [], []
    bundle.network.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))

    class Watched:
        def __getattr__(self, name):
            return getattr(split.images, name)

        def read(self, row):
            read.append(row)
            return split.images.read(row)

    evaluator = Evaluator(runtime, bundle.description.transform, batch_size=20, workers=0)
    yield bundle.network, evaluator, split._replace(images=Watched()), passes, read
    runtime.close()


@pytest.mark.parametrize(
    ("asked", "device", "files", "batches", "number"),
    [
        ("auto", "cuda", True, 100, 6),
        ("auto", "cuda", True, 2, 2),
        ("auto", "cuda", False, 100, 0),
        ("auto", "cpu", True, 100, 0),
        (4, "cpu", True, 100, 4),
        (4, "cuda", False, 1, 1),
        (0, "cuda", True, 100, 0),
    ],
)
def test_images_are_loaded_by_processes_beside_a_gpu(
    asked, device, files, batches, number, monkeypatch
):
    monkeypatch.setattr(evaluator_module, "cores", lambda: 6)
    runtime = SimpleNamespace(device=torch.device(device))
    evaluator = Evaluator(runtime, EvalSpec.for_size(10, 3), batch_size=20, workers=asked)
    split = SimpleNamespace(images=SimpleNamespace(from_files=files))
    assert evaluator._loaders(split, batches, 20) == number


def test_no_more_of_them_are_started_than_shared_memory_has_room_for(monkeypatch):
    """In Docker it has 64 MiB."""
    monkeypatch.setattr(evaluator_module, "cores", lambda: 6)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    runtime = SimpleNamespace(device=torch.device("cuda"))
    evaluator = Evaluator(runtime, EvalSpec.for_size(224, 3), batch_size=64, workers="auto")
    split = SimpleNamespace(images=SimpleNamespace(from_files=True))
    assert evaluator._loaders(split, 100, 64) == 2


def precisions():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_networks_are_evaluated_without_tf32(counted):
    """On a GPU torch's default for convolutions is TF32, with ten bits of mantissa; for products one can ask for it."""
    network, evaluator, split, *_ = counted
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        seen, before = [], precisions()
        network.register_forward_pre_hook(lambda *_: seen.append(precisions()))
        for _ in evaluator.probabilities(network, split):
            assert precisions() == before
        assert before == ("tf32", "tf32")
        assert seen == [("ieee", "ieee")] * 2
    finally:
        torch.set_float32_matmul_precision(products)


def test_one_pass_gives_predictions_and_embeddings(counted):
    network, evaluator, split, passes, read = counted
    predictions, embeddings = evaluator.predictions_and_embeddings(network, split)
    assert passes == [20, 17]
    assert read == list(range(37))
    with torch.no_grad():
        outputs = network(torch.stack([split.images.read(row) for row in range(37)]))
    torch.testing.assert_close(embeddings, outputs.embedding, rtol=1e-4, atol=1e-5)
    probabilities = outputs.logits.softmax(1)
    expected = probabilities.gather(1, predictions.top)
    torch.testing.assert_close(predictions.probabilities, expected, rtol=1e-4, atol=1e-5)
    own = probabilities[torch.arange(37), torch.from_numpy(split.labels)]
    torch.testing.assert_close(predictions.own, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tta", "views"), [("none", 1), ("flip", 2), ("tencrop", 10)])
def test_views_read_every_image_once_and_need_no_larger_batch(counted, tta, views):
    network, evaluator, split, passes, read = counted
    list(evaluator.probabilities(network, split, tta))
    assert read == list(range(37))
    assert sum(passes) == views * 37
    assert max(passes) == 20


def test_of_many_training_images_the_nearest_have_their_own_labels(counted, monkeypatch):
    network, evaluator, split, *_ = counted
    compared = []
    monkeypatch.setattr(evaluator_module, "NEIGHBOURS", 40)
    monkeypatch.setattr(evaluator_module, "knn_accuracy", lambda *given: compared.append(given))
    train = load_dataset("digits").splits["train"].take(np.arange(100))
    evaluator.knn(network, train, split)
    ((keys, key_labels, embeddings, labels),) = compared
    rows = range(0, 100, 3)  # 34; every second image would be 50
    assert key_labels.tolist() == train.labels[rows].tolist()
    assert torch.allclose(keys, evaluator.embeddings(network, train, range(100))[rows], atol=1e-5)
    assert (len(embeddings), labels.tolist()) == (37, split.labels.tolist())


def test_features_are_kept_for_the_weights_of_the_backbone(
    counted, untrained, monkeypatch, tmp_path
):
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path))
    network, evaluator, split, passes, _ = counted
    runtime, spec = Runtime(device="cpu", precision="fp32"), read_description(untrained).spec
    head = next(network.heads.parameters())
    weight = next(network.backbone.parameters())
    looks = []
    for changed in (None, None, head, weight):
        if changed is not None:
            changed.data.view(-1)[0] += 1
        passes.clear()
        found = frozen_features(evaluator, runtime, network, split, spec)
        looks.append(len(passes) > 0)
        assert torch.equal(found, evaluator.features(network, split))
    assert looks == [True, False, False, True]


def test_a_model_that_is_not_finished(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ModelError, match="no finished model"):
        evaluate(tmp_path / "run")
