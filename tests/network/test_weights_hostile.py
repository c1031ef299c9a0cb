"""Malicious files of weights: no code from them runs, and none unpacks to more than its size."""

import argparse
import json
import os
import struct
import zipfile

import pytest
import torch
from tests.network.weights_cases import refused, timm_tensors, write

from nearkin.network import tensor_files


@pytest.fixture(scope="module")
def timm_weights():
    return timm_tensors()


class Payload:
    """Touches a file when unpickled the ordinary way."""

    def __init__(self, marker, call):
        self.marker, self.call = marker, call

    def __reduce__(self):
        if self.call == "mkdir":
            return os.mkdir, (str(self.marker),)
        if self.call == "eval":
            return eval, (f"__import__('os').mkdir({str(self.marker)!r})",)
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", ["system", "eval", "mkdir"])
def test_a_malicious_pickle_is_refused(tmp_path, timm_weights, call, zipped):
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    content = {"state_dict": timm_weights, "args": Payload(marker, call)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "could run code" in refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload must work where it is let"


def test_a_raw_pickle_and_a_renamed_one_are_refused(tmp_path):
    import pickle

    marker = tmp_path / "marker"
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(marker, "system")))
        refused(tmp_path / name)
    assert not marker.exists()


def test_python_objects_are_refused_with_the_way_out(tmp_path, timm_weights):
    torch.save({"state_dict": timm_weights, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert ".safetensors" in refused(tmp_path / "w.pth")


def test_torchscript_is_refused(tmp_path):
    source = tmp_path / "w.pt"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("w/constants.pkl", b"\x80\x02}.")
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/code/net.py", "raise SystemExit")
        archive.writestr("w/version", "3\n")
    refused(source)


def test_a_compressed_bomb_is_refused_before_it_unpacks(tmp_path, timm_weights):
    write(tmp_path / "plain.pth", timm_weights | {"bomb": torch.zeros(2**24)})
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry.filename))
    assert (tmp_path / "bomb.pth").stat().st_size < 2**24
    assert "more than it holds" in refused(tmp_path / "bomb.pth")


def test_a_stride_of_zero_is_refused(tmp_path, timm_weights):
    huge = torch.ones(1).expand(10**12)
    torch.save(timm_weights | {"huge": huge}, tmp_path / "w.pth")
    assert "huge" in refused(tmp_path / "w.pth")
    torch.save(timm_weights | {"sparse": torch.eye(3).to_sparse()}, tmp_path / "s.pth")
    assert "sparse" in refused(tmp_path / "s.pth")


def test_too_many_tensors_are_refused(tmp_path, monkeypatch, timm_weights):
    monkeypatch.setattr(tensor_files, "MOST_TENSORS", 10)
    assert "more than 10 tensors" in refused(write(tmp_path / "w.pth", timm_weights))


def test_hostile_safetensors_headers(tmp_path):
    path = tmp_path / "w.safetensors"

    def header(entries, data=b""):
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return refused(path)

    path.write_bytes(struct.pack("<Q", 100 << 20) + b" " * 1000)
    assert "header is too long" in refused(path)
    path.write_bytes(struct.pack("<Q", 2**63))
    assert "header is too long" in refused(path)
    cell = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "damaged" in header({"a": cell}, b"1234")
    assert "damaged" in header({"a": cell, "b": cell}, b"12345678")
    assert "damaged" in header({"a": {**cell, "shape": [2**62]}}, b"12345678")
    assert "damaged" in header({"a": {**cell, "shape": [-2]}}, b"12345678")
    assert "damaged" in header({"a": {**cell, "dtype": "X9"}}, b"12345678")
