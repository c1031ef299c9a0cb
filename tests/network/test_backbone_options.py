"""Backbones with options of their own, sizes in evaluation, and BEiT-3."""

from __future__ import annotations

import pytest
import torch

from nearkin.errors import ConfigError, ModelError
from nearkin.network import Network, build_backbone, check_eval_size
from nearkin.network import backbone as backbone_module
from nearkin.network.backbone import MOST_WEIGHTS

BEIT3 = "beit3_base_patch16_224.pt"


def build(model, image_size=32, pretrained=False, drop_path=0.0, **options):
    torch.manual_seed(0)
    return build_backbone(
        model,
        pretrained=pretrained,
        channels=3,
        image_size=image_size,
        stem="auto",
        drop_path=drop_path,
        options=options,
    )


def test_options_shape_the_model():
    assert len(build("test_vit", depth=3).module.blocks) == 3
    small = build("resnet18", layers=[1, 1, 1, 1]).module
    assert [len(getattr(small, f"layer{n}")) for n in (1, 2, 3, 4)] == [1] * 4
    assert build("test_vit", embed_dim=32, num_heads=2).dim == 32


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("resnet18", {"depth": 2}, "resnet18 takes no option depth; leave out --model.depth"),
        ("test_vit", {"depths": [1]}, "test_vit takes no option depths"),
        ("repvgg_a0", {"depth": 2}, "repvgg_a0 takes no option depth"),
        ("test_vit", {"depth": 2.5}, "test_vit with --model.depth 2.5 cannot"),
        ("resnet18", {"layers": 3}, "resnet18 with --model.layers 3 cannot"),
        ("resnet18", {"block": 3}, "resnet18 with --model.block 3 cannot"),
        ("test_vit", {"embed_dim": 33, "num_heads": 2}, "--model.embed_dim 33"),
    ],
)
def test_options_that_cannot_be(model, options, says):
    with pytest.raises(ConfigError) as caught:
        build(model, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_layer_that_would_fill_the_memory_is_refused_before_it_is_filled():
    with pytest.raises(ConfigError) as caught:
        build("vit_tiny_patch16_224", mlp_ratio=16384, embed_dim=768)
    assert any(words in str(caught.value) for words in (f"more than {MOST_WEIGHTS}", "memory"))


def test_many_layers_are_counted_while_they_are_built(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(backbone_module, "MOST_WEIGHTS", 1_000_000)
        with pytest.raises(ConfigError, match="more than 1000000 weights"):
            build("test_vit", depth=16384)
        build("test_vit", depth=1)  # each model has the whole number
        build("test_vit", depth=1)
    build("test_vit", depth=10)


def test_pretrained_weights_of_another_shape(monkeypatch):
    def misfit(model, **asked):
        if "file" in asked:
            raise RuntimeError("Error(s) in loading state_dict for VisionTransformer: ...")
        return created(model, **asked)

    import timm

    created = timm.create_model
    monkeypatch.setattr(backbone_module, "pretrained_options", lambda _: {"file": "x"})
    monkeypatch.setattr(timm, "create_model", misfit)
    with pytest.raises(ModelError, match="do not fit test_vit with --model.depth 2; leave out"):
        build("test_vit", pretrained=True, depth=2)


def test_another_size_in_evaluation():
    resnet, vit = build("test_resnet"), build("vit_tiny_patch16_224", depth=1)
    check_eval_size(resnet.module, resnet.dim, "test_resnet", 3, 48)
    with pytest.raises(ConfigError, match="48 x 48 pixels.*another --eval-size") as caught:
        check_eval_size(vit.module, vit.dim, "vit_tiny", 3, 48)
    assert "\n" not in str(caught.value)
    able = build("vit_tiny_patch16_224", depth=1, dynamic_img_size=True)
    check_eval_size(able.module, able.dim, "vit_tiny", 3, 48)
    with pytest.raises(ConfigError, match="--eval-size"):  # patches of 16 do not fill it
        check_eval_size(able.module, able.dim, "vit_tiny", 3, 40)


def test_beit3_at_depth_2():
    """Sub-layer norms, mean-pooled tokens, and stochastic depth that rises to its rate."""
    built = build(BEIT3, image_size=64, drop_path=0.15, depth=2)
    module = built.module
    assert (built.dim, built.stem, len(module.blocks)) == (768, "default", 2)
    assert any(name.endswith("attn.norm.weight") for name, _ in module.named_parameters())
    rates = [m.drop_prob for m in module.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.15)
    network = Network(module, {}, dim=768, mean=built.mean, std=built.std)
    network.train()
    images = torch.rand(8, 3, 64, 64)

    def features(step, rows=slice(None)):
        network.key.set(7, step, rows.start or 0, 1)
        torch.manual_seed(step)  # must not matter
        return network(images[rows]).features

    with torch.no_grad():
        whole = features(1)
        assert torch.equal(features(1), whole)
        assert not torch.equal(features(2), whole)
        halves = torch.cat([features(1, slice(0, 4)), features(1, slice(4, 8))])
    assert torch.allclose(halves, whole, atol=1e-5), "drawn by sample, not by batch"
    features(1).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
