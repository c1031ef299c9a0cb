"""Pretrained weights from a filled cache, without any network, and what is said when there is none."""

import socket

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from nearkin.errors import ModelError
from nearkin.network import build_backbone

NAME = "test_resnet"


def build(model=NAME, **changes):
    asked = {"channels": 3, "image_size": 32, "stem": "auto", "drop_path": 0.0}
    return build_backbone(model, pretrained=True, **(asked | changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty hub cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def weights(cache):
    """Weights of the model with its 1 000 classes, laid into the cache as the hub's client does."""
    torch.manual_seed(5)
    tensors = timm.create_model(NAME).state_dict()
    folder = cache / f"models--timm--{NAME}.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(tensors, folder / "snapshots" / "abc" / "model.safetensors")
    return tensors


def test_a_filled_cache_needs_no_network(weights):
    backbone = build()
    loaded = backbone.module.state_dict()
    assert len(loaded) == len(weights) - 2  # the classifier
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    assert backbone.stem == "default", "a small stem would not fit the weights"


def test_the_online_client_is_not_even_asked(weights, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert torch.equal(build().module.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])


@pytest.mark.parametrize("channels", [1, 4])
def test_pretrained_filters_fit_the_channels(weights, channels):
    first = build(channels=channels).module.get_submodule("conv1.0").weight
    published = weights["conv1.0.weight"]
    expected = (
        published.sum(1, keepdim=True) if channels == 1 else published[:, [0, 1, 2, 0]] * 3 / 4
    )
    assert torch.allclose(first, expected)


def test_an_empty_cache_is_one_sentence(cache):
    with pytest.raises(ModelError) as caught:
        build()
    text = str(caught.value)
    assert caught.value.code == 4
    assert NAME in text
    assert "--weights FILE" in text
    assert "--from-scratch" in text
    assert "\n" not in text


def test_a_damaged_cache_is_one_sentence(weights, cache):
    next(cache.rglob("model.safetensors")).write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="--weights FILE"):
        build()


def test_a_model_without_weights_says_so(cache):
    with pytest.raises(ModelError, match="no pretrained weights for convnext_atto_rms") as caught:
        build("convnext_atto_rms")
    assert "--weights FILE" in str(caught.value)
    assert "--from-scratch" in str(caught.value)
