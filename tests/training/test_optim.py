"""Groups, learning rates and state of the optimisers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nearkin.network import Network, projection_head
from nearkin.objectives import Head
from nearkin.settings import Settings
from nearkin.teacher import Teacher
from nearkin.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_lr,
)


class Backbone(nn.Sequential):
    def no_weight_decay(self):
        return {"0.weight"}


def network():
    torch.manual_seed(0)
    backbone = Backbone(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 6)
    )
    heads = {"projection": Head(projection_head(6, 8, 5), "features", "embedding")}
    return Network(backbone, heads, dim=6, mean=(0.5,) * 3, std=(0.5,) * 3)


def build(net, name, **options):
    given = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": True}
    given |= {"decay_all": False, "layer_decay": 1.0, "head_lr": 1.0, "clip_grad": None} | options
    return build_optimizer(net, Settings.model_construct(optimizer=name, **given))


def groups_of(net, decay_all=False):
    return parameter_groups(net, weight_decay=0.01, decay_all=decay_all, layer_decay=1.0)


def names(net, group):
    by_id = {id(p): n for n, p in net.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_lamb_clips_to_one_unless_another_norm_is_given():
    assert build(network(), "lamb").defaults["max_grad_norm"] == 1.0
    assert build(network(), "lamb", clip_grad=5.0).defaults["max_grad_norm"] is None


def test_matrices_decay_and_norms_biases_and_exempt_ones_do_not():
    net = network()
    decayed, free = groups_of(net)
    assert decayed["weight_decay"] == 0.01
    assert free["weight_decay"] == 0.0
    assert names(net, decayed) == {
        "backbone.2.weight",
        "backbone.4.weight",
        "heads.projection.0.weight",
        "heads.projection.3.weight",
    }
    assert names(net, decayed) | names(net, free) == {n for n, _ in net.named_parameters()}
    (everything,) = groups_of(net, decay_all=True)
    assert names(net, everything) == {n for n, _ in net.named_parameters()}


def test_a_model_may_name_exempt_ones_by_a_pattern():
    net = network()
    net.backbone.no_weight_decay = lambda: {"4.*"}
    decayed, _ = groups_of(net)
    assert "backbone.2.weight" in names(net, decayed)
    assert "backbone.4.weight" not in names(net, decayed)


def test_frozen_weights_are_not_optimised():
    net = network()
    net.activate(("projection",), freeze_backbone=True)
    groups = groups_of(net)
    assert all(n.startswith("heads.") for group in groups for n in names(net, group))


def test_a_group_may_scale_its_learning_rate():
    optimizer = build(network(), "sgd")
    optimizer.param_groups[1]["lr_scale"] = 0.5
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


@pytest.mark.parametrize("decay_all", [False, True])
def test_the_heads_may_learn_faster_than_the_backbone(decay_all):
    net = network()
    optimizer = build(net, "adamw", head_lr=3.0, decay_all=decay_all)
    set_lr(optimizer, 0.2)
    rates = {}
    for group in optimizer.param_groups:
        rates |= dict.fromkeys(names(net, group), group["lr"])
    assert rates == {
        name: pytest.approx(0.6 if name.startswith("heads.") else 0.2)
        for name, _ in net.named_parameters()
    }
    assert all("lr_scale" not in group for group in groups_of(net, decay_all))


def advance(net, optimizer, seed):
    torch.manual_seed(seed)
    net(torch.rand(4, 3, 8, 8)).embedding.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_state_goes_on_bit_for_bit(name, layout):
    one, other = network().to(memory_format=layout), network().to(memory_format=layout)
    first, second = build(one, name), build(other, name)
    for seed in range(3):
        advance(one, first, seed)
    other.load_state_dict(one.state_dict())
    stored = {n: t.contiguous().clone() for n, t in optimizer_tensors(first, one).items()}
    load_optimizer_tensors(second, other, stored)
    for seed in range(3, 6):
        advance(one, first, seed)
        advance(other, second, seed)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize(
    ("nesterov", "momentum"), [(True, 0.9), (False, 0.9), (True, 0.0), (False, 0.0)]
)
def test_two_steps_of_sgd_by_hand(nesterov, momentum):
    """g = dL/dw + wd w; buf = mu buf + g; w -= lr (g + mu buf) with Nesterov, lr buf without."""
    net = network()
    optimizer = build(net, "sgd", nesterov=nesterov, momentum=momentum)
    weight = net.backbone[4].weight
    expected, buffer = weight.detach().clone(), torch.zeros_like(weight)
    net.train()
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.rand(4, 3, 8, 8)).embedding.square().sum().backward()
        gradient = weight.grad.clone() + 0.01 * expected
        buffer = momentum * buffer + gradient
        expected = expected - 0.1 * (gradient + momentum * buffer if nesterov else buffer)
        optimizer.step()
        assert torch.allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("policy", ["own", "average"])
def test_teacher_follows_its_student(policy):
    student = network()
    teacher = Teacher(student, batchnorm=policy)
    before = {n: t.clone() for n, t in teacher.network.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
        student.backbone[1].running_mean.add_(2.0)
        student.backbone[1].num_batches_tracked.add_(7)
    teacher.update(student, 0.9)
    after = teacher.network.state_dict()
    for name, _ in student.named_parameters():
        assert torch.allclose(after[name], before[name] + 0.1, atol=1e-6), name
    moved = after["backbone.1.running_mean"] - before["backbone.1.running_mean"]
    assert torch.allclose(moved, torch.full_like(moved, 0.2 if policy == "average" else 0.0))
    assert after["backbone.1.num_batches_tracked"] == (7 if policy == "average" else 0)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_an_own_teacher_normalises_with_the_batch_and_an_average_one_does_not():
    student = network()
    own, average = Teacher(student, batchnorm="own"), Teacher(student, batchnorm="average")
    images = torch.rand(4, 3, 8, 8)
    for teacher, alone_changes in ((own, True), (average, False)):
        together = teacher(images).embedding[:2]
        alone = teacher(images[:2]).embedding
        assert torch.allclose(together, alone, atol=1e-5) != alone_changes
        assert not together.requires_grad


def fresh_steps(name, classes=2):
    network = nn.Linear(3, classes)
    return network, build(network, name, weight_decay=0.1, decay_all=True)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_steps_are_those_of_the_factory_of_timm(name):
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    ours, optimizer = fresh_steps(name)
    theirs = nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    reference = create_optimizer_v2(theirs.parameters(), name, 0.1, weight_decay=0.1, **momentum)
    for _ in range(3):
        rows = torch.randn(4, 3)
        for network, steps in ((ours, optimizer), (theirs, reference)):
            network(rows).square().sum().backward()
            steps.step()
            steps.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert mine.grad is None


def test_the_hooks_of_torch_see_our_steps():
    network, optimizer = fresh_steps("sgd")
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert seen == ["before"]
    assert "momentum_buffer" in next(iter(optimizer.state_dict()["state"].values()))


def test_no_compiler_is_loaded_for_a_step():
    program = (
        "import sys, torch\n"
        "from tests.training.test_optim import fresh_steps\n"
        "for name in ('sgd', 'adamw', 'lamb'):\n"
        "    network, optimizer = fresh_steps(name)\n"
        "    network(torch.ones(1, 3)).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "    assert 'torch._dynamo' not in sys.modules, name\n"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=240, cwd=Path(__file__).parents[2])
