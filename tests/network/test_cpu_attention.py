"""Attention on a CPU: which path is taken where, and that both compute the same."""

import contextlib
from functools import partial

import pytest
import timm
import torch
from timm.layers import Attention, RelPosBias
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn
from torch.nn import functional as F

from nearkin.network.cpu import avoid_slow_attention


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


def attention():
    torch.manual_seed(0)
    module = Attention(24, num_heads=3, qkv_bias=True)
    avoid_slow_attention(module)
    return module


@pytest.mark.parametrize(
    ("tokens", "autocast", "expected"),
    [(256, True, 0), (257, True, 1), (17, False, 1), (256, False, 1)],
)
@pytest.mark.parametrize("backward", [True, False])
def test_few_tokens_take_plain_products_under_autocast(fused, tokens, autocast, backward, expected):
    module = attention()
    with (
        torch.set_grad_enabled(backward),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        module(torch.randn(2, tokens, 24))
    assert len(fused) == expected


def test_the_same_module_takes_the_other_path_in_another_pass(fused):
    module = attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(2, 200, 24))
    assert not fused
    module(torch.randn(2, 200, 24))
    assert len(fused) == 1


def test_other_devices_and_other_models_keep_the_fused_kernel(fused):
    attention()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention().to("meta")(torch.empty(2, 4, 24, device="meta"))
        Attention(24, num_heads=3)(torch.randn(2, 4, 24))
    assert len(fused) == 2
    assert timm.layers.use_fused_attn()


@pytest.mark.parametrize("backward", [True, False])
def test_a_learned_bias_takes_plain_products_in_every_pass(fused, backward):
    module = RelPosAttention(24, num_heads=3, rel_pos_cls=partial(RelPosBias, window_size=(4, 4)))
    avoid_slow_attention(module)
    with torch.set_grad_enabled(backward):
        module(torch.randn(2, 16, 24))
    assert not fused


def test_attention_whose_fused_kernel_is_off_is_left_alone():
    module = Attention(24, num_heads=3)
    module.fused_attn = False
    avoid_slow_attention(module)
    assert not module._forward_pre_hooks


def test_inputs_of_another_shape_keep_the_fused_kernel(fused):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused_attn = True

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x) if self.fused_attn else x

    module = Windows()
    avoid_slow_attention(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(1, 2, 4, 8))
        module(x := torch.randn(1, 4, 8))
        assert len(fused) == 1
        module(x=x)  # given by name: the hook does not see it
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
        module.fused_attn = not chosen
        tokens = torch.randn(8, 16, 24, requires_grad=True)
        output = module(tokens) if mask is None else module(tokens, mask)
        loss = (output * output.detach().cos()).sum()
        found.append([output, *torch.autograd.grad(loss, [tokens, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_in_bfloat16_the_gradient_is_as_good_as_the_kernels():
    """Against float64, on the same weights."""

    def gradients(dtype, chosen):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=8, img_size=64).to(dtype)
        if chosen:
            avoid_slow_attention(model)
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
    avoid_slow_attention(model)
    images = torch.randn(4, 3, 32, 32)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.compile(backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
