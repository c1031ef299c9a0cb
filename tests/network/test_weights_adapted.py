"""Weights of another image size or number of channels: adapted as timm adapts its own, and reported."""

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from tests.network.weights_cases import make, timm_tensors, write
from timm.layers import resample_abs_pos_embed

from nearkin.network import Network, build_backbone, load_weights


def network(model, *, image_size=32, channels=3, seed=0):
    torch.manual_seed(seed)
    built = build_backbone(
        model,
        pretrained=False,
        channels=channels,
        image_size=image_size,
        stem="default",
        drop_path=0.0,
    )
    return Network(built.module, {}, dim=built.dim, mean=built.mean, std=built.std)


def adapted_by_timm(model, file, channels, **size):
    """timm's own: the file as pretrained weights of the model."""
    overlay = {"file": str(file), "input_size": (channels[0], 32, 32)}
    made = timm.create_model(
        model,
        num_classes=0,
        in_chans=channels[1],
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **size,
    )
    return made.state_dict()


@pytest.mark.parametrize(
    ("model", "sizes", "channels", "adapted"),
    [
        ("test_vit", (32, 48), (3, 3), 1),
        ("test_vit", (32, 64), (3, 1), 2),
        ("swin_tiny_patch4_window7_224", (32, 64), (3, 3), 10),
        ("test_coatnet", (32, 64), (3, 3), 3),
        ("test_resnet", (32, 48), (3, 1), 1),
        ("test_resnet", (32, 32), (1, 3), 1),
        ("test_resnet", (32, 32), (3, 5), 1),
        ("repvgg_a0", (32, 32), (3, 1), 2),
        ("tresnet_m", (32, 32), (3, 1), 1),  # space to depth: 48 inputs become 16
    ],
)
def test_timm_adapts_in_the_same_way(tmp_path, model, sizes, channels, adapted):
    source = network(model, image_size=sizes[0], channels=channels[0], seed=1)
    file = write(tmp_path / "model.safetensors", source.state_dict())
    plain = tmp_path / "plain.safetensors"
    save_file(source.backbone.state_dict(), plain)
    target = network(model, image_size=sizes[1], channels=channels[1], seed=2)
    sized = {"img_size": sizes[1]} if sizes[0] != sizes[1] and model != "test_resnet" else {}
    with warnings.catch_warnings(action="ignore"):
        expected = adapted_by_timm(model, plain, channels, **sized)
    report = load_weights(target, file)
    found = target.backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(report.adapted) == adapted
    assert set(report.adapted) <= set(report.loaded)
    assert not report.missing
    assert set(report.mismatched) <= {"mean", "std"}
    assert f"{adapted} adapted to this image size or number of channels (backbone." in str(report)


def test_a_position_embedding_is_resampled(tmp_path):
    source = network("test_vit", image_size=32)
    target = network("test_vit", image_size=48)
    report = load_weights(target, write(tmp_path / "w.safetensors", source.state_dict()))
    expected = resample_abs_pos_embed(source.backbone.pos_embed, [3, 3], num_prefix_tokens=1)
    assert torch.equal(target.backbone.pos_embed, expected)
    assert report.adapted == {"backbone.pos_embed": "1x5x64 in the file, 1x10x64 here"}


def test_filters_of_colours_are_summed_for_grey_images(tmp_path):
    tensors = timm_tensors()
    target = make(channels=1)
    report = load_weights(target, write(tmp_path / "w.safetensors", tensors))
    grey = tensors["conv1.0.weight"].sum(1, keepdim=True)
    assert torch.equal(target.backbone.conv1[0].weight, grey)
    assert list(report.adapted) == ["backbone.conv1.0.weight"]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(1, 7, 64), torch.ones(5, 64), torch.ones(1, 0, 64), torch.ones(1, 5, 65)],
)
def test_what_cannot_be_adapted_is_left_as_initialised(tmp_path, tensor):
    target = network("test_vit", image_size=48)
    before = target.backbone.pos_embed.clone()
    given = network("test_vit", seed=1).state_dict() | {"backbone.pos_embed": tensor}
    report = load_weights(target, write(tmp_path / "w.safetensors", given))
    assert torch.equal(target.backbone.pos_embed, before)
    assert list(report.mismatched) == ["backbone.pos_embed"]
    assert report.adapted == {}


def test_a_stem_of_another_kernel_is_left_as_initialised(tmp_path):
    source = timm.create_model("resnet10t").state_dict()
    source["conv1.0.weight"] = torch.ones(24, 3, 7, 7)
    target = network("resnet10t", channels=1)
    report = load_weights(target, write(tmp_path / "w.safetensors", source))
    assert "backbone.conv1.0.weight" in report.mismatched
