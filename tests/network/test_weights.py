"""Weights from files: what fits is loaded, the rest is reported, and files that are no checkpoint are refused."""

import os
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from tests.network.weights_cases import make, refused, same, timm_tensors, write
from torch import nn

from nearkin.errors import ModelError
from nearkin.network import load_weights, read_safetensors, tensor_files
from nearkin.network import weights as room


@pytest.fixture(scope="module")
def timm_weights():
    return timm_tensors()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_a_timm_file_fills_the_backbone(tmp_path, timm_weights, suffix):
    network = make()
    head = network.heads["classifier"].weight.clone()
    report = load_weights(network, write(tmp_path / f"w{suffix}", timm_weights))
    assert same(network, timm_weights, "backbone.")
    assert len(report.loaded) == len(timm_weights) - 2
    assert sorted(report.unexpected) == ["backbone.fc.bias", "backbone.fc.weight"]
    assert report.missing == ("heads.classifier.weight", "heads.classifier.bias")
    assert report.mismatched == {}
    assert torch.equal(network.heads["classifier"].weight, head)
    text = str(report)
    assert f"{len(timm_weights) - 2} tensors loaded" in text
    assert "2 in the file but not used (backbone.fc." in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3, "arch": "x"},
        lambda t: {"model": t, "best": 0.5},
        lambda t: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": t},
        lambda t: {f"module.{n}": v for n, v in t.items()},
        lambda t: {"state_dict": OrderedDict((f"module._orig_mod.{n}", v) for n, v in t.items())},
        lambda t: {f"backbone.{n}": v for n, v in t.items()},
        lambda t: {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in t.items()},
        lambda t: {
            n: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
            for n, v in t.items()
        },
    ],
)
def test_wrappers_and_prefixes(tmp_path, timm_weights, wrap):
    network = make()
    report = load_weights(network, write(tmp_path / "w.pth", wrap(timm_weights)))
    assert len(report.loaded) == len(timm_weights) - 2
    assert same(network, timm_weights, "backbone.")


def test_a_file_from_before_the_counters_fills_the_backbone(tmp_path, timm_weights):
    """Nothing reads BatchNorm's counters, so BatchNorm may keep the statistics of the file."""
    older = {n: t for n, t in timm_weights.items() if not n.endswith("num_batches_tracked")}
    assert len(older) < len(timm_weights)
    report = load_weights(make(), write(tmp_path / "w.pth", older))
    assert report.whole_backbone
    assert report.missing == ("heads.classifier.weight", "heads.classifier.bias")


def test_a_legacy_file_is_read(tmp_path, timm_weights):
    torch.save(timm_weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = make()
    load_weights(network, tmp_path / "old.pth")
    assert same(network, timm_weights, "backbone.")


def test_a_run_of_nearkin_gives_all_that_fits(tmp_path):
    source, network = make(seed=1, classes=5), make(seed=2, classes=5)
    run = tmp_path / "run"
    run.mkdir()
    write(run / "model.safetensors", source.state_dict())
    report = load_weights(network, run)
    assert report.missing == report.unexpected == ()
    assert same(network, source.state_dict())

    other = make(seed=3, classes=7)
    report = load_weights(other, run / "model.safetensors")
    assert report.mismatched == {
        "heads.classifier.weight": "5x96 in the file, 7x96 here",
        "heads.classifier.bias": "5 in the file, 7 here",
    }
    assert same(other.backbone, source.backbone.state_dict())
    bare = make(seed=4).backbone
    load_weights(bare, run)
    assert same(bare, source.backbone.state_dict())


def test_weights_of_another_model_are_refused(tmp_path):
    tensors = timm.create_model("test_vit").state_dict()
    assert "does not fit" in refused(write(tmp_path / "w.pth", tensors))
    # A nearkin run of another model shares only mean and std.
    names = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1), "backbone.z": torch.ones(2)}
    assert "does not fit" in refused(write(tmp_path / "w.safetensors", names))


def test_numbers_that_are_none_are_refused(tmp_path, timm_weights):
    broken = {n: t.clone() for n, t in timm_weights.items()}
    broken["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    text = refused(write(tmp_path / "w.pth", broken))
    assert "not finite, first in backbone.layer2.0.conv1.weight" in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no zip",
        b"\x80\x02 no pickle",
        b"<html>404</html>",
        random.Random(0).randbytes(4096),
    ],
)
def test_no_checkpoint_at_all(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    text = refused(path)
    assert "damaged or no" in text
    assert "weights_only" not in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file(tmp_path, timm_weights, suffix):
    path = write(tmp_path / f"w{suffix}", timm_weights)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "damaged or no" in refused(path)


def test_paths_that_are_no_file(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.pth")
    assert "has no model.safetensors; a run that has not ended" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in refused(tmp_path / "pipe.pth")
    (tmp_path / "net.onnx").write_bytes(b"x")
    assert "no file of weights" in refused(tmp_path / "net.onnx")
    assert "bad\\nname" in refused(tmp_path / "bad\nname.pth")


def test_a_file_that_is_too_large_is_not_opened(tmp_path, timm_weights, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST_FILE", 1000)
    assert "larger than" in refused(write(tmp_path / "w.pth", timm_weights))
    assert "larger than" in refused(write(tmp_path / "w.safetensors", timm_weights))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3],
        {"epoch": 3},
        {"state_dict": {"a": 1}},
        {3: torch.ones(2)},
        torch.ones(3),
    ],
)
def test_a_pickle_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert "no state dict" in refused(tmp_path / "w.pth")


def test_read_safetensors_reads(tmp_path, timm_weights):
    tensors = read_safetensors(write(tmp_path / "w.safetensors", timm_weights))
    assert tensors.keys() == timm_weights.keys()
    assert all(torch.equal(tensors[n], timm_weights[n]) for n in timm_weights)
    with pytest.raises(ModelError, match="does not exist"):
        read_safetensors(tmp_path / "none.safetensors")


def test_long_lists_are_cut():
    report = room.LoadReport(Path("w.pth"), ("a",), tuple(f"n{i}" for i in range(9)), (), {}, {})
    assert "(n0, n1, n2, n3, n4 and 4 more)" in str(report)
