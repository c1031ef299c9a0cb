"""Attention among few tokens: which path is taken where, and that both compute the same."""

import contextlib

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch.nn import functional as F

from nearkin.network.cpu import choose_attention


@pytest.fixture
def fused(monkeypatch):
    """How often the fused kernel was called."""
    calls = []
    kernel = F.scaled_dot_product_attention

    def counted(*given, **named):
        calls.append(1)
        return kernel(*given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def attention(dtype=torch.float32):
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, qkv_bias=True).to(dtype)
    choose_attention(module)
    return module


@pytest.mark.parametrize(
    ("dtype", "tokens", "backward", "expected"),
    [
        (torch.float32, 128, True, 0),
        (torch.float32, 129, True, 1),
        (torch.float32, 32, False, 0),
        (torch.float32, 33, False, 1),
        (torch.bfloat16, 256, True, 0),
        (torch.bfloat16, 257, True, 1),
        (torch.bfloat16, 64, False, 0),
        (torch.bfloat16, 65, False, 1),
        (torch.float64, 2, True, 1),
    ],
)
def test_few_tokens_take_plain_products(fused, dtype, tokens, backward, expected):
    with torch.set_grad_enabled(backward):
        attention(dtype)(torch.randn(2, tokens, 24, dtype=dtype))
    assert len(fused) == expected


def test_under_autocast_its_dtype_counts(fused):
    module = attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(2, 200, 24))
    assert not fused
    module(torch.randn(2, 200, 24))  # and the same module, in another pass, takes the other path
    assert len(fused) == 1


def test_elsewhere_the_kernel_stays(fused):
    module = attention().to("meta")
    module(torch.empty(2, 4, 24, device="meta"))
    assert len(fused) == 1


def test_what_draws_its_own_dropout_is_left_as_it_was_set():
    module = Attention(24, num_heads=3)
    module.fused_attn = False
    choose_attention(module)
    assert not module._forward_pre_hooks


def test_windows_of_another_shape_are_left_to_the_kernel(fused):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused_attn = True

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x) if self.fused_attn else x

    module = Windows()
    choose_attention(module)
    module(torch.randn(1, 2, 4, 8))
    module(x := torch.randn(1, 4, 8))
    assert len(fused) == 1
    module(x=x)  # by name: not seen
    assert len(fused) == 2


def swin_mask():
    return torch.randint(2, (4, 16, 16), generator=torch.Generator().manual_seed(0)) * -100.0


@pytest.mark.parametrize(
    ("build", "mask"),
    [
        (
            lambda: Attention(
                24, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm
            ),
            None,
        ),
        (lambda: WindowAttention(24, num_heads=3, window_size=4), None),
        (lambda: WindowAttention(24, num_heads=3, window_size=4), swin_mask()),
    ],
)
def test_both_paths_are_the_same(build, mask):
    found = []
    for chosen in (False, True):
        torch.manual_seed(0)
        module = build()
        module.fused_attn = True  # timm leaves it off for windows
        if chosen:
            choose_attention(module)
        tokens = torch.randn(8, 16, 24, requires_grad=True)
        output = module(tokens) if mask is None else module(tokens, mask)
        assert module.fused_attn is not chosen
        loss = (output * output.detach().cos()).sum()
        found.append([output, *torch.autograd.grad(loss, [tokens, *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_the_gradient_is_as_good_as_the_kernels():
    """Against float64, on the same weights."""

    def gradients(dtype, chosen):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=8, img_size=64).to(dtype)
        if chosen:
            choose_attention(model)
        images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        half = dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext():
            loss = F.cross_entropy(model(images).to(dtype), torch.arange(32) % 8)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten().double() for g in grads])

    exact = gradients(torch.float64, chosen=False)
    plain, kernel = ((gradients(torch.float32, chosen=c) - exact).norm() for c in (True, False))
    assert 0 < plain < 1.2 * kernel
    assert plain < 0.05 * exact.norm()


def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    choose_attention(model)
    images = torch.randn(4, 3, 32, 32)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.compile(backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
