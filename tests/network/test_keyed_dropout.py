"""Masks from (seed, step, module, view, position): the numbers, their independence, and how they split."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from nearkin.errors import ConfigError
from nearkin.network import KeyedDropout, KeyedDropPath, RandomKey, key_randomness

CPU = torch.device("cpu")
WORD = (1 << 64) - 1


def key(seed=0, step=0, offset=0, views=1, rows=8):
    made = RandomKey()
    made.set(seed, step, offset, views)
    made.begin(rows)
    return made


def uniform(drawn):
    return drawn.double() / 2.0**64 + 0.5


def splitmix(state, word):
    """The published finaliser on Python's whole numbers."""
    z = ((state ^ word) + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@pytest.mark.parametrize(
    ("seed", "step", "offset", "views"), [(0, 0, 0, 1), (2**62 + 5, 999, 24, 2)]
)
def test_draws_equal_an_oracle(seed, step, offset, views):
    drawn = key(seed, step, offset, views, rows=6).draw(3, (6, 2, 2), CPU)
    for row in range(6):
        view, position = divmod(row, 6 // views)
        state = 0
        for word in (seed, step, view, offset + position):
            state = splitmix(state, word)
        for element in range(4):
            expected = splitmix(state, (3 << 32) + element)
            assert int(drawn[row].flatten()[element]) & WORD == expected


def test_a_shared_draw_depends_on_the_step_alone():
    for step in (5, 6):
        drawn = key(7, step, offset=24, views=2, rows=6).draw(3, (5, 2), CPU, shared=True)
        state = splitmix(splitmix(0, 7), step)
        expected = [splitmix(state, (3 << 32) + element) for element in range(10)]
        assert [int(value) & WORD for value in drawn.flatten()] == expected


def test_the_finaliser_is_the_published_one():
    # First outputs of splitmix64 seeded with 0: state 0, then state = increment.
    assert splitmix(0, 0) == 0xE220A8397B1DCDAF
    assert splitmix(0x9E3779B97F4A7C15, 0) == 0x6E789E6AA1B965F4


def test_draws_are_uniform():
    values = uniform(key(rows=200).draw(0, (200, 500), CPU)).flatten()
    count = len(values)
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    bins = torch.histc(values, 64, 0, 1)
    chi = float(((bins - count / 64) ** 2 / (count / 64)).sum())
    assert 63 - 4 * math.sqrt(126) < chi < 63 + 4 * math.sqrt(126)


def test_each_bit_is_fair():
    drawn = key(rows=100).draw(0, (100, 300), CPU).flatten()
    for bit in range(64):
        share = float(((drawn >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(len(drawn)), bit


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def neighbours():
    """Pairs of draws that differ in one thing by one."""
    base = key().draw(0, (8, 2000), CPU)
    yield "seed", base, key(seed=1).draw(0, (8, 2000), CPU)
    yield "step", base, key(step=1).draw(0, (8, 2000), CPU)
    yield "module", base, key().draw(1, (8, 2000), CPU)
    yield "row", base[:-1], base[1:]
    yield "element", base[:, :-1], base[:, 1:]
    two = key(views=2).draw(0, (8, 2000), CPU)
    yield "view", two[:4], two[4:]
    yield "seed and step", key(seed=1).draw(0, (8, 2000), CPU), key(step=1).draw(0, (8, 2000), CPU)


@pytest.mark.parametrize("number", range(7))
def test_neighbours_are_independent(number):
    name, a, b = list(neighbours())[number]
    a, b = uniform(a), uniform(b)
    limit = 4.5 / math.sqrt(a.numel())
    assert abs(correlation(a, b)) < limit, name
    assert abs(correlation((a - 0.5).square(), (b - 0.5).square())) < limit, name
    assert not torch.equal(a, b)


def test_rows_of_one_module_over_steps_are_independent():
    # One number per row and step, as stochastic depth draws them.
    table = torch.stack([uniform(key(step=s, rows=64).draw(5, (64,), CPU)) for s in range(256)])
    for matrix in (table, table.T):
        between = torch.corrcoef(matrix).triu(1)
        pairs = between[between != 0]
        assert pairs.abs().max() < 6 / math.sqrt(matrix.shape[1])
        assert abs(pairs.std() * math.sqrt(matrix.shape[1]) - 1) < 0.1


MODULES = {
    "dropout": (lambda k: KeyedDropout(0.4, k, 2), (16, 6, 5)),
    "channels": (lambda k: KeyedDropout(0.4, k, 2, channels=True), (16, 6, 3, 3)),
    "path": (lambda k: KeyedDropPath(0.4, k, 2, True), (16, 6, 5)),
    "path unscaled": (lambda k: KeyedDropPath(0.4, k, 2, False), (16, 6, 5)),
    "windows": (lambda k: KeyedDropout(0.4, k, 2), (64, 6, 5)),
    "path over windows": (lambda k: KeyedDropPath(0.4, k, 2, True), (64, 6)),
}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_a_batch_equals_its_halves(kind, views):
    make, shape = MODULES[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    made = RandomKey()
    module = make(made)

    def run(x, offset, rows):
        made.set(7, 11, offset, views)
        made.begin(rows)
        return module(x)

    whole = run(x, 40, 16)
    by_view = x.unflatten(0, (views, 16 // views, -1))
    first, second = by_view.chunk(2, dim=1)
    parts = [
        run(part.flatten(0, 2), offset, 8).unflatten(0, (views, 8 // views, -1))
        for part, offset in ((first, 40), (second, 40 + 8 // views))
    ]
    assert torch.equal(torch.cat(parts, dim=1).flatten(0, 2), whole)
    moved = run(x, 41, 16)
    assert not torch.equal(moved, whole), "the position must matter"


def test_masks_are_what_they_say():
    made = key(rows=512)
    x = torch.rand(512, 40) + 1
    y = KeyedDropout(0.3, made, 0)(x)
    dropped = y == 0
    assert abs(float(dropped.double().mean()) - 0.3) < 4 * math.sqrt(0.21 / x.numel())
    assert torch.allclose(y[~dropped], x[~dropped] / 0.7)

    x4 = torch.rand(512, 40, 2, 2) + 1
    y = KeyedDropout(0.3, made, 1, channels=True)(x4)
    gone = (y == 0).flatten(2)
    assert torch.equal(gone.all(2), gone.any(2))
    assert 0.25 < float(gone.all(2).double().mean()) < 0.35

    y = KeyedDropPath(0.3, made, 2, scale_by_keep=True)(x4)
    gone = (y == 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1))
    assert 0.2 < float(gone.all(1).double().mean()) < 0.4
    assert torch.allclose(y[~gone.all(1)], x4[~gone.all(1)] / 0.7)
    y = KeyedDropPath(0.3, made, 2, scale_by_keep=False)(x4)
    assert torch.equal(y[~gone.all(1)], x4[~gone.all(1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_masks_keep_the_dtype_and_are_the_same_in_each(dtype):
    y = KeyedDropout(0.5, key(), 0)(torch.ones(8, 100, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y.double(), KeyedDropout(0.5, key(), 0)(torch.ones(8, 100)).double())


def test_the_gradient_is_masked_too():
    x = torch.ones(8, 50, requires_grad=True)
    y = KeyedDropout(0.5, key(), 0)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_evaluation_and_the_ends_of_p():
    x = torch.randn(8, 5)
    lost = RandomKey()
    for module in (KeyedDropout(0.5, lost, 0), KeyedDropPath(0.5, lost, 0)):
        assert module.eval()(x) is x
    assert KeyedDropout(0.0, lost, 0)(x) is x
    assert KeyedDropPath(0.0, lost, 0)(x) is x
    assert torch.equal(KeyedDropout(1.0, key(), 0)(x), torch.zeros_like(x))


def test_without_a_key_each_pass_has_masks_of_torchs_generator():
    unset, x = RandomKey(), torch.ones(64, 50)

    def passed(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        unset.begin(64)
        return KeyedDropout(0.5, unset, 0)(x), KeyedDropPath(0.5, unset, 1)(x)

    first, second, again = passed(3), passed(), passed(3)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, second))
    assert float(first[0].mean()) == pytest.approx(1, abs=0.1)
    assert len(first[0].unique(dim=0)) == 64


def test_odd_rows_are_errors():
    with pytest.raises(ValueError, match="does not divide"):
        KeyedDropout(0.5, key(rows=8), 0)(torch.ones(12, 2))
    with pytest.raises(ValueError, match="views"):
        KeyedDropout(0.5, key(rows=7, views=2), 0)(torch.ones(7, 2))


def vit():
    return timm.create_model(
        "test_vit",
        num_classes=0,
        img_size=32,
        attn_drop_rate=0.2,
        proj_drop_rate=0.2,
        pos_drop_rate=0.1,
        drop_path_rate=0.3,
    )


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        img_size=32,
        window_size=4,
        depths=(1, 2),
        embed_dim=16,
        num_heads=(2, 2),
        attn_drop_rate=0.2,
        proj_drop_rate=0.2,
        drop_path_rate=0.3,
    )


def relative():
    """A dropout on the table of relative positions, which has no rows of images."""
    model = timm.create_model("test_vit_relpos", num_classes=0, img_size=32, drop_path_rate=0.3)
    for parameter in model.parameters():  # its blocks start at almost nothing
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("build", [vit, swin, relative])
def test_a_timm_model_is_keyed_throughout(build):
    torch.manual_seed(0)
    model, made = build(), RandomKey()
    dropping = [n for n, m in model.named_modules() if type(m).__name__ in ("Dropout", "DropPath")]
    assert key_randomness(model, made) is model
    keyed = {n: model.get_submodule(n) for n in dropping}
    assert [m.number for m in keyed.values()] == list(range(len(dropping)))
    assert all(m.key is made for m in keyed.values())
    assert not any(type(m).__name__ in ("Dropout", "DropPath") for m in model.modules())
    if build is not relative:  # which drops no attention
        assert {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")} == {False}

    images = torch.randn(8, 3, 32, 32)

    def run(images, step=0, offset=0):
        made.set(0, step, offset, 1)  # and whatever the global generator says
        made.begin(len(images))
        return model(images)

    whole = run(images)
    assert torch.equal(run(images), whole)
    halves = torch.cat([run(images[:4]), run(images[4:], offset=4)])
    assert torch.allclose(halves, whole, atol=1e-5)
    assert not torch.allclose(run(images, step=1), whole, atol=1e-2)
    assert run(images[:3]).shape == (3, model.num_features), "any number of images"
    model.eval()
    assert not torch.allclose(run(images), whole, atol=1e-2)


def test_attention_without_dropout_stays_fused():
    model = timm.create_model("test_vit", num_classes=0)
    fused = {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}
    key_randomness(model, RandomKey())
    assert {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")} == fused


def test_a_copy_has_one_key_of_its_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    made = RandomKey()
    key_randomness(model, made)
    made.set(0, 0, 0, 1)
    made.begin(4)
    model(torch.ones(4, 3))
    twin = copy.deepcopy(model)
    assert twin[0].key is twin[1][0].key
    assert twin[0].key is not made
    twin[0].key.set(0, 1, 0, 1)
    before = model[0](torch.ones(4, 30))
    twin[0].key.begin(4)
    assert not torch.equal(twin[0](torch.ones(4, 30)), before)
    assert torch.equal(model[0](torch.ones(4, 30)), before)


def test_kinds_and_modes_survive():
    model = nn.Sequential(
        nn.Dropout(0.1), nn.Dropout2d(0.2), nn.Dropout3d(0.3).eval(), nn.Dropout1d(0.4)
    )
    key_randomness(model, RandomKey())
    assert [m.p for m in model] == [0.1, 0.2, 0.3, 0.4]
    assert [m.channels for m in model] == [False, True, True, True]
    assert [m.training for m in model] == [True, True, False, True]
    assert isinstance(key_randomness(nn.Dropout(0.5), RandomKey()), KeyedDropout)


@pytest.mark.parametrize("active", [nn.AlphaDropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.1)])
def test_randomness_without_a_keyed_kind_is_refused(active):
    with pytest.raises(ConfigError, match=type(active).__name__):
        key_randomness(nn.Sequential(active), RandomKey())
    key_randomness(nn.Sequential(nn.AlphaDropout(0.0), nn.MultiheadAttention(4, 2)), RandomKey())
