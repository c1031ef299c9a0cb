"""SyncBatchNorm on one process is torch's BatchNorm; test_ranks.py shows the same of several."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nearkin.errors import ConfigError
from nearkin.network import SyncBatchNorm, synchronise_batchnorm

KINDS = {
    "1d rows": (lambda: nn.BatchNorm1d(5), (7, 5)),
    "1d sequences": (lambda: nn.BatchNorm1d(5), (3, 5, 4)),
    "2d": (lambda: nn.BatchNorm2d(5), (4, 5, 3, 6)),
    "3d": (lambda: nn.BatchNorm3d(5), (2, 5, 3, 2, 4)),
    "no affine": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 3, 6)),
    "cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (4, 5, 3, 6)),
    "untracked": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 3, 6)),
    "other numbers": (lambda: nn.BatchNorm2d(5, eps=0.1, momentum=0.7), (4, 5, 3, 6)),
    "with activation": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU), (4, 5, 3, 6)),
    "with dropout": (lambda: BatchNormAct2d(5, drop_layer=nn.Hardtanh), (4, 5, 3, 6)),
}


def pair(make, dtype):
    torch.manual_seed(0)
    reference = make().to(dtype)
    for parameter in reference.parameters():
        nn.init.uniform_(parameter, -2, 2)
    return reference, SyncBatchNorm(copy.deepcopy(reference))


def error(value, reference):
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))


def run(norm, batches, weights):
    """Outputs and input gradients of three training batches, then the parameter gradients and buffers."""
    seen = []
    for batch, weight in zip(batches, weights, strict=True):
        x = batch.clone().requires_grad_()
        y = norm(x)
        (y * weight).sum().backward()
        seen += [y.detach(), x.grad]
    return seen + [p.grad for p in norm.parameters()] + list(norm.buffers())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_torch(kind, dtype, tolerance):
    make, shape = KINDS[kind]
    reference, ours = pair(make, dtype)
    batches = [torch.randn(shape, dtype=dtype) * 3 + 1 for _ in range(3)]
    weights = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    expected, got = run(reference, batches, weights), run(ours, batches, weights)
    assert len(got) == len(expected) >= 6
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_torch(kind):
    make, shape = KINDS[kind]
    reference, ours = pair(make, torch.float32)
    for _ in range(2):
        batch = torch.randn(shape) + 2
        reference(batch), ours(batch)
    x = torch.randn(shape)
    reference.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), reference.eval()(x))


def test_gradients_by_differences():
    _, ours = pair(lambda: nn.BatchNorm2d(2), torch.float64)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = ours.weight, ours.bias

    def function(x, weight, bias):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_a_large_mean_cancels_nothing():
    torch.manual_seed(0)
    x = torch.randn(64, 2, 8, 8) + 1e4
    ours = SyncBatchNorm(nn.BatchNorm2d(2, momentum=1.0))
    ours(x)
    exact = x.double().var((0, 2, 3))
    naive = (x**2).mean((0, 2, 3)) - x.mean((0, 2, 3)) ** 2
    assert error(naive, exact) > 0.1, "the case is too easy"
    assert error(ours.running_var, exact) < 1e-5


def test_channels_last_stays():
    x = torch.randn(4, 5, 3, 6).contiguous(memory_format=torch.channels_last)
    reference, ours = pair(lambda: nn.BatchNorm2d(5), torch.float32)
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, reference(x)) < 1e-6


def test_autocast_keeps_statistics_in_float32():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3)
    reference, ours = pair(lambda: nn.BatchNorm2d(5), torch.float32)
    results = []
    for norm in (reference, ours):
        x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(convolution(x))
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        results.append((y.float(), norm.running_mean, norm.running_var, norm.weight.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        assert error(got, expected) < 1e-2
    assert error(results[1][1], results[0][1]) < 1e-6
    assert error(results[1][2], results[0][2]) < 1e-6


def test_one_value_per_channel_cannot_train():
    with pytest.raises(ValueError, match="larger batch"):
        SyncBatchNorm(nn.BatchNorm1d(3))(torch.ones(1, 3))


def test_every_batchnorm_is_replaced_and_keeps_what_it_had():
    model = timm.create_model("test_byobnet", num_classes=0)  # BatchNormAct2d inside
    model.extra = nn.Sequential(nn.BatchNorm1d(3), nn.ModuleDict({"norm": nn.BatchNorm3d(2)}))
    model.again = model.extra[0]
    before = model.state_dict(keep_vars=True)
    names = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    assert len(names) > 8

    assert synchronise_batchnorm(model, "cpu") is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(type(model.get_submodule(name)) is SyncBatchNorm for name in names)
    assert model.again is model.extra[0]
    again = dict(model.named_modules())
    synchronise_batchnorm(model, "cpu")
    assert dict(model.named_modules()) == again, "a second time changes nothing"


def test_a_lone_batchnorm_is_returned_replaced():
    norm = nn.BatchNorm1d(3).eval()
    new = synchronise_batchnorm(norm, "cpu")
    assert type(new) is SyncBatchNorm
    assert new.weight is norm.weight
    assert not new.training


def test_gpus_get_those_of_torch_and_timm():
    """Conversion only: torch's synchronise on a GPU alone."""
    torch.manual_seed(0)
    model = timm.create_model(
        "test_byobnet", num_classes=0
    )  # BatchNormAct2d, with and without activation
    model.extra = nn.BatchNorm1d(model.num_features)
    twin = copy.deepcopy(model)
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    assert set(kinds.values()) == {BatchNormAct2d, nn.BatchNorm1d}
    before = model.state_dict(keep_vars=True)

    assert synchronise_batchnorm(model, "cuda") is model
    for name, kind in kinds.items():
        expected = SyncBatchNormAct if kind is BatchNormAct2d else nn.SyncBatchNorm
        assert type(model.get_submodule(name)) is expected
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    images = torch.randn(4, 3, 32, 32)
    for mode in (True, False):  # without ranks they compute as before, the activation included
        assert torch.equal(model.train(mode)(images), twin.train(mode)(images))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, type("Own", (nn.BatchNorm2d,), {})])
def test_an_unknown_batchnorm_is_refused(kind, device):
    with pytest.raises(ConfigError, match=kind.__name__):
        synchronise_batchnorm(nn.Sequential(kind(3)), device)


def test_a_copy_stands_alone():
    model = synchronise_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), "cpu")
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 3))
    assert int(model[0].num_batches_tracked) == 0
    assert int(twin[0].num_batches_tracked) == 1
