"""Layer-wise learning rates: the power of the decay at every depth, and what a run does with it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from nearkin.errors import ConfigError
from nearkin.network import (
    Network,
    build_backbone,
    layer_scales,
    names_layers,
    projection_head,
)
from nearkin.objectives import Head
from nearkin.settings import Settings
from nearkin.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_lr,
)

DECAY = 0.65
SIZE = 32
VIT = {"embed_dim": 24, "num_heads": 3}
RESNET18 = {(stage, block): 2 * (stage - 1) + block for stage in (1, 2, 3, 4) for block in (0, 1)}
CONVNEXT_ATTO = [2, 2, 6, 2]  # blocks of its stages


def beit_layer(name, depth):
    """The published numbering: 0 for what makes the tokens, i + 1 for block i, depth + 1 for all the rest."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) + 1 if found else depth + 1


def depth_in_vit(name, depth=12):
    return depth + 1 - beit_layer(name, depth)


def depth_in_resnet18(name):
    """Layers between a weight and the heads: the stem below 8 blocks."""
    if name.startswith(("conv1", "bn1")):
        return 9
    stage, block = re.match(r"layer(\d)\.(\d)\.", name).groups()
    return 8 - RESNET18[int(stage), int(block)]


def depth_in_convnext(name):
    """A stage's downsampling belongs to its first block; the norm before the heads to them."""
    if name.startswith("stem"):
        return 13
    found = re.match(r"stages\.(\d)\.(?:downsample|blocks\.(\d))", name)
    if not found:
        return 0
    return 12 - sum(CONVNEXT_ATTO[: int(found[1])]) - int(found[2] or 0)


CASES = {
    "vit_tiny_patch16_224": (VIT, depth_in_vit, 13),
    "beit3_base_patch16_224.pt": (VIT, depth_in_vit, 13),
    "resnet18": ({}, depth_in_resnet18, 9),
    "convnext_atto": ({}, depth_in_convnext, 13),
}


def backbone_of(model, **options):
    return build_backbone(
        model,
        pretrained=False,
        channels=3,
        image_size=SIZE,
        stem="auto",
        drop_path=0.0,
        options=options,
    )


def network_of(model, **options):
    torch.manual_seed(0)
    built = backbone_of(model, **options)
    heads = {"projection": Head(projection_head(built.dim, 8, 5), "features", "embedding")}
    return Network(built.module, heads, dim=built.dim, mean=built.mean, std=built.std)


def optimizer_of(net, name="adamw", **options):
    given = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.0, "nesterov": False}
    given |= {"decay_all": False, "layer_decay": DECAY, "head_lr": 1.0}
    return build_optimizer(net, Settings.model_construct(optimizer=name, **given | options))


@pytest.mark.parametrize("model", CASES)
def test_the_scale_at_every_depth(model):
    options, depth, deepest = CASES[model]
    net = network_of(model, **options)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, weight_decay=0.05, decay_all=False, layer_decay=DECAY)
    seen, depths = [], set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            inside = name.startswith("backbone.")
            below = depth(name.removeprefix("backbone.")) if inside else 0
            depths.add(below)
            assert group["lr_scale"] == pytest.approx(DECAY**below, rel=1e-12), name
    assert sorted(seen) == sorted(name for name, _ in net.named_parameters())
    assert len(seen) == len(set(seen))
    has_top = model != "resnet18"  # which ends in a block
    assert depths == set(range(deepest + 1))
    assert has_top == (0 in {depth(n) for n, _ in net.backbone.named_parameters()})


def test_groups_keep_what_decays_apart():
    net = network_of("test_vit")
    names = {id(p): name for name, p in net.named_parameters()}
    for group in parameter_groups(net, weight_decay=0.05, decay_all=False, layer_decay=DECAY):
        for parameter in group["params"]:
            name = names[id(parameter)]
            free = parameter.dim() <= 1 or name.endswith(("pos_embed", "cls_token"))
            assert group["weight_decay"] == (0.0 if free else 0.05), name
    everything = parameter_groups(net, weight_decay=0.05, decay_all=True, layer_decay=DECAY)
    assert {group["weight_decay"] for group in everything} == {0.05}


def test_without_decay_the_groups_are_two_and_have_no_scale():
    groups = parameter_groups(
        network_of("test_vit"), weight_decay=0.05, decay_all=False, layer_decay=1.0
    )
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all("lr_scale" not in group for group in groups)


class Stages(nn.Module):
    """Two stages with a transition after each, which timm counts with the stage's last block, and a last norm."""

    def __init__(self):
        super().__init__()
        for name in ("stem", "block0", "norm0", "block1", "norm1", "norm"):
            self.add_module(name, nn.Linear(2, 2))

    def group_matcher(self, coarse):
        assert not coarse
        blocks = [(r"^block(\d)", (0,)), (r"^norm(\d)", (99999,)), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}


def test_only_what_closes_the_backbone_joins_the_heads():
    scales = layer_scales(Stages(), DECAY)
    depths = {"stem": 3, "block0": 2, "norm0": 2, "block1": 1, "norm1": 1, "norm": 0}
    assert scales == {
        f"{name}.{kind}": DECAY**depth
        for name, depth in depths.items()
        for kind in ("weight", "bias")
    }
    closing = layer_scales(backbone_of("efficientnet_lite0").module, DECAY)
    assert closing["conv_head.weight"] == closing["bn2.weight"] == 1.0
    assert closing["blocks.6.0.conv_pw.weight"] == DECAY


def test_a_backbone_that_does_not_name_its_layers():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert not names_layers(plain)
    with pytest.raises(ConfigError, match="leave out --layer-decay and --blocks"):
        parameter_groups(plain, weight_decay=0.0, decay_all=False, layer_decay=0.9)
    assert len(parameter_groups(plain, weight_decay=0.0, decay_all=False, layer_decay=1.0)) == 2


def test_the_rate_of_the_heads_is_beside_the_scales_of_the_layers():
    net = network_of("test_vit")
    depth = len(net.backbone.blocks)
    names = {id(p): name for name, p in net.named_parameters()}
    options = {"weight_decay": 0.05, "decay_all": False, "layer_decay": DECAY, "head_lr": 3.0}
    for group in parameter_groups(net, **options):
        for parameter in group["params"]:
            name = names[id(parameter)]
            inside = name.startswith("backbone.")
            below = depth_in_vit(name.removeprefix("backbone."), depth)
            assert group["lr_scale"] == pytest.approx(DECAY**below if inside else 3.0), name


def test_the_schedule_multiplies_by_the_scale_and_the_step_shows_it():
    """One step of plain gradient descent: each weight moves by lr 0.65^depth times its gradient."""
    net = network_of("test_vit")
    depth = len(net.backbone.blocks)
    optimizer = optimizer_of(net, "sgd", weight_decay=0.0)
    set_lr(optimizer, 0.02)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(torch.rand(4, 3, SIZE, SIZE)).embedding.square().sum().backward()
    optimizer.step()
    moved = 0
    for name, parameter in net.named_parameters():
        inside = name.startswith("backbone.")
        below = depth_in_vit(name.removeprefix("backbone."), depth) if inside else 0
        step = 0.02 * DECAY**below * parameter.grad
        assert torch.allclose(parameter, before[name] - step, rtol=1e-5, atol=1e-7), name
        moved += bool(step.abs().max() > 1e-6)
    assert moved > 10


def advance(net, optimizer, seed):
    torch.manual_seed(seed)
    set_lr(optimizer, 0.01 * (seed + 1))
    net(torch.rand(4, 3, SIZE, SIZE)).embedding.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_state_goes_on_bit_for_bit(name):
    one, other = network_of("test_vit"), network_of("test_vit")
    first = optimizer_of(one, name, momentum=0.9)
    second = optimizer_of(other, name, momentum=0.9)
    for seed in range(2):
        advance(one, first, seed)
    other.load_state_dict(one.state_dict())
    stored = {n: t.contiguous().clone() for n, t in optimizer_tensors(first, one).items()}
    if name == "lamb":  # it counts in its groups
        groups = {key for key in stored if key.startswith("#")}
        assert groups == {f"#{number}/step" for number in range(len(first.param_groups))}
        assert len(groups) > 4
    load_optimizer_tensors(second, other, stored)
    for seed in range(2, 4):
        advance(one, first, seed)
        advance(other, second, seed)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
