"""Which blocks of a backbone learn, and that the others stay exactly as they are."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from nearkin.errors import ConfigError
from nearkin.network import Head, Network, blocks_below_heads, build_backbone


def network_of(model, size=32):
    backbone = build_backbone(
        model, pretrained=False, channels=3, image_size=size, stem="default", drop_path=0.0
    )
    heads = {"classifier": Head(nn.Linear(backbone.dim, 3), "features", "logits")}
    return Network(backbone.module, heads, dim=backbone.dim, mean=backbone.mean, std=backbone.std)


def blocks(model, size=32):
    """The first part of each parameter's name, `blocks.3` with its number, by block from the heads."""
    found = {}
    for name, number in blocks_below_heads(network_of(model, size).backbone).items():
        words = name.split(".")
        part = ".".join(words[:2]) if words[1:2] and words[1].isdigit() else words[0]
        found.setdefault(number, set()).add(part)
    return found


def test_blocks_are_counted_from_the_heads():
    assert blocks("efficientnet_lite0") == {
        0: {"conv_head", "bn2"},
        **{7 - n: {f"blocks.{n}"} for n in range(7)},
        8: {"conv_stem", "bn1"},
    }
    assert blocks("resnet10t") == {
        **{5 - n: {f"layer{n}.0"} for n in range(1, 5)},
        5: {"conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"},
    }
    transformer = blocks("test_vit", 160)
    assert transformer[0] == {"norm"}
    assert transformer[1] == {"blocks.5"}


@pytest.mark.parametrize(("count", "learning"), [(0, 0), (1, 1), (2, 2), (99, 5)])
def test_a_step_changes_only_the_blocks_that_learn(count, learning):
    torch.manual_seed(0)
    network = network_of("resnet10t")
    network.learn_blocks(count)
    with (
        torch.no_grad()
    ):  # no parameter is zero, so that weight decay changes every one that learns
        for parameter in network.parameters():
            parameter.add_(0.1)
    before = deepcopy(network.state_dict())
    learning_parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning_parameters, lr=0.1, weight_decay=0.1)
    network.train()
    network.key.set(0, 0, 0, 1)
    network(torch.rand(4, 3, 32, 32)).logits.square().mean().backward()
    optimizer.step()
    numbers = blocks_below_heads(network.backbone)
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert {"heads.classifier.weight", "heads.classifier.bias"} <= changed
    parameters = {f"backbone.{name}": number for name, number in numbers.items()}
    for name, number in parameters.items():
        assert (name in changed) == (number <= learning), name
    # BatchNorm's statistics belong to the block of its weight.
    for name in before:
        if name.endswith("running_mean"):
            weight = name.replace("running_mean", "weight")
            assert (name in changed) == (parameters[weight] <= learning), name


def test_a_stage_keeps_the_blocks_fixed_and_a_copy_does_too():
    network = network_of("resnet10t")
    network.learn_blocks(1)
    network.activate(("classifier",), freeze_backbone=True)
    network.activate(("classifier",), freeze_backbone=False)
    for each in (network, deepcopy(network)):
        each.eval()
        each.train()
        assert each.backbone.layer4.training
        assert not each.backbone.layer3.training
        assert not each.backbone.layer3[0].conv1.weight.requires_grad
        assert each.backbone.layer4[0].conv1.weight.requires_grad


def test_batchnorm_may_keep_its_statistics_while_everything_learns():
    network = network_of("resnet10t")
    network.keep_statistics()
    before = deepcopy(network.state_dict())
    for each in (network, deepcopy(network)):
        each.eval()
        each.train()
        assert each.backbone.layer4.training
        assert not each.backbone.layer4[0].bn1.training
        assert each.backbone.layer4[0].bn1.weight.requires_grad
        each.key.set(0, 0, 0, 1)
        each(torch.rand(4, 3, 32, 32)).logits.square().mean().backward()
        for name, tensor in each.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert each.backbone.layer4[0].bn1.bias.grad is not None


def test_no_graph_is_kept_for_what_does_not_learn():
    network = network_of("resnet10t")
    network.learn_blocks(1)
    seen = []
    network.backbone.layer3.register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    network.key.set(0, 0, 0, 1)
    network.train()(torch.rand(2, 3, 32, 32))
    assert seen == [False]


def test_a_backbone_without_coarse_groups_has_its_fine_ones():
    with torch.device("meta"):
        backbone = timm.create_model("rdnet_tiny", num_classes=0)
    with pytest.raises(AssertionError):
        backbone.group_matcher(coarse=True)
    assert blocks_below_heads(backbone)["stem.0.weight"] > 3


def test_a_backbone_without_named_layers_is_refused():
    with pytest.raises(ConfigError, match="does not name its layers"):
        blocks_below_heads(nn.Sequential(nn.Linear(2, 2)))
