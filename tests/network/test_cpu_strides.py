"""Images smaller than a stride: the same convolution, and gradients without rubbish in bfloat16."""

import copy

import pytest
import timm
import torch
from torch import nn

from nearkin.network.cpu import fill_strides


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (5, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_filled_convolution_is_the_same(kernel, stride, size):
    draw = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(3, 4, kernel, stride, padding=kernel // 2, dtype=torch.float64)
    filled = copy.deepcopy(plain)
    fill_strides(filled)
    found = []
    for conv in (plain, filled):
        images = torch.randn(2, 3, *size, generator=draw.manual_seed(1), dtype=torch.float64)
        images.requires_grad_()
        output = conv(images)
        loss = (output * output.detach().cos()).sum()
        found.append([output, *torch.autograd.grad(loss, [images, *conv.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(1, 1, 3, stride=2),
        nn.Conv2d(1, 1, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1),
    ],
)
def test_what_would_change_is_left_alone(conv):
    fill_strides(conv)
    assert not conv._forward_pre_hooks


def spoil():
    """Freed memory full of NaN, for the next to find."""
    for power in range(4, 20):
        for more in (0, 5):
            torch.full((2**power + more,), torch.nan)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_bfloat16_hold_no_rubbish(layout):
    """`test_resnet` at 8 pixels, whose last stride meets a single pixel."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1, num_classes=4).to(memory_format=layout)
    fill_strides(network)
    images = torch.rand(32, 1, 8, 8).contiguous(memory_format=layout)
    exact = copy.deepcopy(network).double()
    exact(images.double()).square().sum().backward()
    for _ in range(10):
        network.zero_grad()
        spoil()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        spoil()
        logits.float().square().sum().backward()
        for (name, parameter), reference in zip(
            network.named_parameters(), exact.parameters(), strict=True
        ):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.norm() <= 10 * reference.grad.norm() + 1, name
