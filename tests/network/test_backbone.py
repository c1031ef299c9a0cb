"""Backbones from timm: sizes, channels, stems, statistics, and what cannot be."""

import pytest
import timm
import torch
from torch import nn

from nearkin.errors import ConfigError
from nearkin.network import build_backbone, projection_head, projection_sizes


def build(model, **changes):
    asked = {
        "pretrained": False,
        "channels": 3,
        "image_size": 32,
        "stem": "auto",
        "drop_path": 0.0,
    }
    return build_backbone(model, **(asked | changes))


FAMILIES = {
    "resnet10t": ("small", 512),
    "resnet18": ("small", 512),
    "vit_tiny_patch16_224": ("default", 192),
    "convnext_atto": ("default", 320),
    "test_resnet": ("small", 96),
    "efficientnet_lite0": ("small", 1280),
    "test_nfnet": ("small", 192),
    "test_mambaout": ("small", 256),  # its num_features says 64
    "repvgg_a0": ("small", 1280),  # two convolutions read the image
}


@pytest.mark.parametrize("model", FAMILIES)
def test_families_give_pooled_features(model):
    backbone = build(model)
    assert (backbone.stem, backbone.dim) == FAMILIES[model]
    assert backbone.module.training
    assert all(part.training for part in backbone.module.modules())
    assert all(int(b) == 0 for n, b in backbone.module.named_buffers() if n.endswith("tracked"))
    features = backbone.module(torch.rand(3, 3, 32, 32))
    assert features.shape == (3, backbone.dim)
    features.sum().backward()
    unused = [n for n, p in backbone.module.named_parameters() if p.grad is None]
    assert unused == [], "DDP fails on unused parameters"


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_any_number_of_channels(model, channels):
    backbone = build(model, channels=channels)
    assert len(backbone.mean) == len(backbone.std) == channels
    assert backbone.module(torch.rand(2, channels, 32, 32)).shape == (2, backbone.dim)


def test_statistics_fit_the_channels():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = {c: build("resnet10t", channels=c, image_size=16) for c in (1, 3, 5)}
    assert (found[3].mean, found[3].std) == (mean, std)
    assert found[1].mean == (pytest.approx(sum(mean) / 3),)
    assert found[1].std == (pytest.approx(sum(std) / 3),)
    assert found[5].mean == (*mean, *mean[:2])
    assert found[5].std == (*std, *std[:2])


@pytest.mark.parametrize(
    ("model", "image_size", "stem", "kernel", "stride"),
    [
        ("resnet18", 64, "auto", (3, 3), (1, 1)),
        ("resnet18", 65, "auto", (7, 7), (2, 2)),
        ("resnet18", 32, "default", (7, 7), (2, 2)),
        ("resnet18", 96, "small", (3, 3), (1, 1)),
        ("resnet10t", 8, "auto", (3, 3), (1, 1)),
        ("resnet10t", 8, "default", (3, 3), (2, 2)),
        ("resnetv2_50", 32, "auto", (3, 3), (1, 1)),
    ],
)
def test_stems(model, image_size, stem, kernel, stride):
    backbone = build(model, image_size=image_size, stem=stem)
    first = backbone.module.get_submodule(backbone.module.pretrained_cfg["first_conv"])
    assert (first.kernel_size, first.stride) == (kernel, stride)
    assert tuple(first.weight.shape[2:]) == kernel
    assert first.padding == (kernel[0] // 2,) * 2
    assert backbone.stem == ("small" if stride == (1, 1) else "default")
    with torch.no_grad():
        image = torch.rand(1, 3, image_size, image_size)
        assert first(image).shape[-1] == image_size // stride[0] + image_size % stride[0]


@pytest.mark.parametrize(
    ("model", "image_size"),
    [
        ("levit_128s", 32),
        ("levit_128s", 64),
        ("test_coatnet", 32),
        ("efficientformerv2_s0", 32),
        ("visformer_tiny", 64),
        ("gcvit_xxtiny", 64),
    ],
)
def test_auto_keeps_the_stem_of_a_model_that_cannot_have_a_small_one(model, image_size):
    torch.manual_seed(0)
    backbone = build(model, image_size=image_size)
    assert backbone.stem == "default"
    torch.manual_seed(0)
    expected = build(model, image_size=image_size, stem="default").module.state_dict()
    found = backbone.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ConfigError, match="cannot take images"):
        build(model, image_size=image_size, stem="small")


def test_the_small_stem_keeps_the_pool_and_has_a_sane_scale():
    module = build("resnet18").module
    assert isinstance(module.maxpool, nn.MaxPool2d)
    # He: variance 2 / fan-out, fan-out = 64 * 9.
    assert float(module.conv1.weight.detach().std()) == pytest.approx(
        (2 / (64 * 9)) ** 0.5, rel=0.1
    )


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_patch_embedding_has_no_small_stem(model):
    with pytest.raises(ConfigError, match="--stem default"):
        build(model, stem="small")


def test_stochastic_depth_is_asked_for():
    def rates(drop_path):
        module = build("resnet10t", image_size=16, drop_path=drop_path).module
        return [m.drop_prob for m in module.modules() if type(m).__name__ == "DropPath"]

    assert rates(0.0) == []
    assert max(rates(0.3)) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="--drop-path"):
        build("vgg11_bn", drop_path=0.1)


def test_dropout_before_the_classifier_is_left_to_the_network():
    # ghostnet drops a fifth by default, from the global generator.
    assert timm.create_model("ghostnet_050").drop_rate == 0.2
    assert build("ghostnet_050").module.drop_rate == 0.0


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("resnet19", "Did you mean resnet1"),
        ("resnet18.a9_in1k", "Did you mean resnet18.a"),
        ("xxxxxxxxxxxx", "nearkin list models"),
        ("", "nearkin list models"),
        ("hf-hub:timm/resnet18.a1_in1k", "--weights FILE"),
        ("timm/resnet18", "--weights FILE"),
        ("https://example.org/net.pth", "--weights FILE"),
        ("..\\net", "--weights FILE"),
        ("local-dir:/somewhere", "--weights FILE"),
        ("bad\nname", "bad\\nname"),
    ],
)
def test_names_that_are_none(model, says):
    with pytest.raises(ConfigError) as caught:
        build(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tag_names_the_weights_and_is_fine_without_them():
    assert build("resnet18.a1_in1k").dim == 512


@pytest.mark.parametrize(
    ("model", "image_size", "says"),
    [
        ("vit_tiny_patch16_224", 8, "use 16"),
        ("vit_tiny_patch16_224", 40, "use 32 or 48"),
        ("efficientnet_lite0", 0, "0 x 0 pixels"),
        ("inception_v3", 8, "8 x 8 pixels"),
    ],
)
def test_sizes_that_a_model_cannot_take(model, image_size, says):
    with pytest.raises(ConfigError) as caught:
        build(model, image_size=image_size, stem="default")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [
        (64, (256, 64)),
        (128, (256, 128)),
        (512, (1024, 256)),
        (2048, (4096, 256)),
        (3000, (4096, 256)),
    ],
)
def test_projection_sizes(dim, sizes):
    assert projection_sizes(dim) == sizes


def test_the_projection_head():
    kinds = [type(m) for m in projection_head(6, 8, 4)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    kinds = [type(m) for m in projection_head(6, 8, 4, norm="none")]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear]
    head = projection_head(6, 8, 4)
    assert head[0].bias is None, "BatchNorm would take it away"
    assert head(torch.randn(5, 6)).shape == (5, 4)
