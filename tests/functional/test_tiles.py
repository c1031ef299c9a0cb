"""Large batches: tiles and strips give what the matrices give, at any size, temperature and labels."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from functional_cases import SOFT, differentiated, make, mixed
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck
from torch.nn.functional import normalize, one_hot

from nearkin import functional as F
from nearkin.functional import pairs, strips, tiles

IN_PAIRS = {
    "supcon_out": lambda z, y, t: F.supcon_out(z, y, temperature=t),
    "supcon_in": lambda z, y, t: F.supcon_in(z, y, temperature=t),
    "sincere": lambda z, y, t: F.sincere(z, y, temperature=t),
    **{
        f"schane {h} {p}": lambda z, y, t, h=h, p=p: F.schane(
            z, y, temperature=t, hardness=h, positives=p
        )
        for h in (0.0, 0.7, 1.0, 2.5)
        for p in ("mean", "sum")
    },
    "instance_nce": lambda z, y, t: F.instance_nce(*z.chunk(2), temperature=t),
    "orthogonal_projection": lambda z, y, t: F.PerAnchor(
        F.orthogonal_projection(z, y, gamma=0.5)[None], torch.ones(1, dtype=torch.bool)
    ),
}
every = pytest.mark.parametrize("name", IN_PAIRS)


def labels_of(kind, count):
    draw = torch.Generator().manual_seed(1)
    hard = torch.randint(5, (count,), generator=draw)
    hard[0] = 77  # a lone anchor
    rows = one_hot(hard, 78).double()
    partners = torch.randint(count, (count,), generator=draw)
    return {
        "some": hard,
        "one class": torch.full((count,), 3),
        "distinct": torch.randperm(count, generator=draw),
        "mixed": 0.6 * rows + 0.4 * rows[partners],
        "smoothed": 0.9 * rows + 0.1 / 78,
        "one-hot": rows,
    }[kind]


KINDS = ("some", "one class", "distinct", "mixed", "smoothed", "one-hot")


def rows_of(count, dtype=torch.float64, dim=6):
    draw = torch.Generator().manual_seed(0)
    return normalize(torch.randn(count, dim, generator=draw, dtype=torch.float64), dim=1).to(dtype)


def values_and_gradient(name, z, labels, temperature):
    """Value, validity and the gradient of a sum that weighs every anchor differently."""
    z = z.clone().requires_grad_()
    result = IN_PAIRS[name](z, labels, temperature)
    weights = torch.linspace(-1, 2, len(result.value), dtype=z.dtype)
    (gradient,) = torch.autograd.grad((result.value * weights).sum(), z)
    return result.value.detach(), result.valid, gradient


@pytest.fixture
def small(monkeypatch):
    """Tiles of 8 x 4 or strips of 3, from the first sample on; strips as a GPU would take them, but not compiled."""

    def use(path):
        monkeypatch.setattr(pairs, "LARGE", 0)
        monkeypatch.setattr(pairs, "LARGE_ON_GPU", 0)
        monkeypatch.setattr(pairs, "on_gpu", lambda _: path == "fused strips")
        monkeypatch.setattr(pairs, "STEEP", 0.0 if path == "strips" else 1000.0)
        monkeypatch.setattr(tiles, "HEIGHT", 8)
        monkeypatch.setattr(tiles, "WIDTH", 4)
        monkeypatch.setattr(strips, "HEIGHT", 3)

    return use


paths = pytest.mark.parametrize("path", ["tiles", "strips"])


def close(found, expected, relative):
    assert torch.equal(found[1], expected[1])
    for a, b in ((found[0], expected[0]), (found[2], expected[2])):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= relative * b.norm() + 1e-14


@every
@pytest.mark.parametrize("kept", [0, 40, 2**22])
def test_what_is_kept_changes_nothing(name, kept, small, monkeypatch):
    """No tile, some of them, or all are found again by the backward pass: the same bits."""
    small("tiles")
    z, labels = rows_of(22), labels_of("mixed", 22)
    expected = values_and_gradient(name, z, labels, 0.1)
    monkeypatch.setattr(tiles, "KEPT", kept)
    found = values_and_gradient(name, z, labels, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every
@pytest.mark.parametrize("path", ["tiles", "strips", "fused strips"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 22, 24])
def test_as_from_matrices(name, path, kind, count, small):
    z, labels = rows_of(count), labels_of(kind, count)
    expected = values_and_gradient(name, z, labels, 0.1)
    small(path)
    close(values_and_gradient(name, z, labels, 0.1), expected, 1e-12)


@pytest.mark.parametrize("name", [n for n in IN_PAIRS if n != "instance_nce"])
@paths
def test_a_single_sample(name, path, small):
    expected = values_and_gradient(name, rows_of(1), torch.tensor([4]), 0.1)
    small(path)
    close(values_and_gradient(name, rows_of(1), torch.tensor([4]), 0.1), expected, 0)


@every
@paths
@pytest.mark.parametrize("kind", ["some", "mixed"])
def test_the_gradient_is_that_of_finite_differences(name, path, kind, small):
    small(path)
    labels = labels_of(kind, 8)
    leaf = rows_of(8).requires_grad_()
    assert gradcheck(lambda z: IN_PAIRS[name](z, labels, 0.2).value, [leaf])


@pytest.mark.parametrize("name", [n for n in SOFT if n in IN_PAIRS or "schane" in n])
@paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hard", "all equal", "distinct"])
def test_one_hot_rows_are_the_hard_labels_to_the_last_bit(name, path, dtype, kind, small):
    small(path)
    labels = {"hard": [0, 0, 1, 1, 1, 2, 2, 3, 0, 1], "all equal": [1] * 9, "distinct": [3, 1, 0]}
    hard = make(labels[kind], dtype)
    soft = hard._replace(labels=one_hot(hard.labels, 4).to(dtype))
    first, second = differentiated(SOFT[name], soft, 0.1), differentiated(SOFT[name], hard, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("temperature", [0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.5])
@every
def test_in_float32_at_any_temperature(name, temperature, monkeypatch):
    """Near rows in two tight clusters: e^(s) spans what a temperature of 0.01 makes of it, 170 orders of magnitude."""
    draw = torch.Generator().manual_seed(0)
    centre = normalize(torch.randn(2, 16, generator=draw, dtype=torch.float64), dim=1)
    centre[1] = -centre[0]
    noise = 0.2 * torch.randn(400, 16, generator=draw, dtype=torch.float64)
    z = normalize(centre.repeat(200, 1) + noise, dim=1)
    labels = torch.randint(7, (400,), generator=draw)
    expected = values_and_gradient(name, z, labels, temperature)
    monkeypatch.setattr(pairs, "LARGE", 0)
    found = values_and_gradient(name, z.float(), labels, temperature)
    # What rounding the largest exponent, (1 + h) / T, leaves of it in float32.
    rounding = 2**-23 * (3.5 if "2.5" in name else 2) / temperature
    found = tuple(x.double() if x.is_floating_point() else x for x in found)
    close(found, expected, 1e-5 + rounding)


def test_which_way_is_taken(monkeypatch):
    """Matrices for few samples; tiles for many; strips where an unshifted exponential could overflow or vanish."""
    asked = []
    monkeypatch.setattr(pairs, "sums_in_tiles", lambda *_: asked.append("tiles") or ())
    monkeypatch.setattr(pairs, "in_strips", lambda *_: asked.append("strips") or ())
    few, many = rows_of(pairs.LARGE - 1), rows_of(pairs.LARGE)
    pairs.pair_sums(few, labels_of("some", len(few)), 0.01, pairs.LogSum("others"))
    for temperature, scale in ((0.1, 6.9), (0.015, 1.0), (0.1, 7.1), (0.014, 1.0)):
        term = pairs.LogSum("others", scale)
        pairs.pair_sums(many, labels_of("some", len(many)), temperature, term)
    assert asked == ["tiles", "tiles", "strips", "strips"]


def test_which_way_is_taken_on_a_gpu(monkeypatch):
    """At any temperature; compiled where there is a compiler for it."""
    asked = []
    monkeypatch.setattr(pairs, "on_gpu", lambda _: True)
    monkeypatch.setattr(pairs, "LARGE_ON_GPU", 100)
    monkeypatch.setattr(pairs, "fused", lambda sums: asked.append(sums) or sums)
    for count, wanted in ((99, []), (100, [pairs._sums])):
        z, labels = rows_of(count), labels_of("some", count)
        pairs.pair_sums(z, labels, 0.01, pairs.LogSum("others"))
        assert asked == wanted
    pairs.softplus_sum(z, labels, 0.01, z[:, 0])
    assert asked == [pairs._sums, pairs._softplus]


@pytest.mark.parametrize("there", [True, False])
def test_strips_are_compiled_where_there_is_a_compiler(there, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(strips, "has_triton", lambda: there)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    strips.fused.cache_clear()
    assert (strips.fused(pairs._sums) is pairs._sums) != there
    assert strips.fused(pairs._sums) is strips.fused(pairs._sums)
    strips.fused.cache_clear()


@pytest.mark.slow
def test_compiled_strips():
    """By torch's compiler for this processor, in a process without the checks of types, which it cannot follow."""
    script = Path(__file__).with_name("compiled_strips.py")
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"supcon_out", "schane", "sincere"}
    for name, (errors, graphs, breaks) in found.items():
        assert max(errors) < 1e-12, name
        assert graphs > 0, name
        assert breaks == 0, name


@pytest.mark.parametrize("kind", ["2048 classes", "one class", "distinct", "lone"])
@pytest.mark.parametrize("name", ["supcon_out", "supcon_in", "sincere", "schane 1.0 mean"])
def test_4096_samples(name, kind):
    """At full size and in float32, against the matrices in float64."""
    z = rows_of(4096, torch.float32, dim=16)
    draw = torch.Generator().manual_seed(2)
    labels = {
        "2048 classes": torch.arange(2048).repeat(2),
        "one class": torch.zeros(4096, dtype=torch.long),
        "distinct": torch.arange(4096),
        "lone": torch.randint(100, (4096,), generator=draw).index_fill(0, torch.tensor([7]), 1000),
    }[kind]
    value, valid, gradient = values_and_gradient(name, z, labels, 0.1)
    few = torch.arange(0, 4096, 64)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    shared = labels[few, None] == labels
    shared[torch.arange(len(few)), few] = False
    assert torch.equal(valid[few], shared.any(1))
    expected = pairs._sums(labels, 0.1, (pairs.LogSum("others"),), z.double(), few)
    if name == "supcon_out" and kind != "distinct":
        similarity = z[few].double() @ z.double().T / 0.1
        mean = (similarity * shared).sum(1) / shared.sum(1).clamp(min=1)
        wanted = (expected[0] - mean) * valid[few]
        torch.testing.assert_close(value[few].double(), wanted, rtol=1e-5, atol=1e-5)


def test_large_batches_are_differentiated_once(small):
    small("tiles")
    z = rows_of(10).requires_grad_()
    total = F.mean_valid(F.supcon_out(z, labels_of("some", 10), temperature=0.1))
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(total, z, create_graph=True)


def test_memory_grows_with_the_samples_and_not_with_their_pairs():
    """No tensor of more than a tile, what is kept, or the features: counted through every operation, both ways."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor):
                    self.size = max(self.size, each.numel())
            return out

    z = rows_of(8 * pairs.LARGE, torch.float32).requires_grad_()
    labels = labels_of("some", len(z))
    for name in IN_PAIRS:
        with Largest() as largest:
            F.mean_valid(IN_PAIRS[name](z, labels, 0.1)).backward()
        assert largest.size <= max(tiles.HEIGHT * tiles.WIDTH, tiles.KEPT, z.numel()), name
    assert len(z) ** 2 > 3 * largest.size
    with Largest() as largest:
        F.mean_valid(F.supcon_out(z, labels, temperature=0.01)).backward()
    assert largest.size <= max(strips.HEIGHT * len(z), z.numel())


def test_soft_labels_are_sorted_too(small):
    """The order of the batch comes back: value and gradient follow a permutation."""
    z, labels = rows_of(24), mixed([0, 1, 2, 3] * 6, list(range(23, -1, -1)), 0.7)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    small("tiles")
    first = IN_PAIRS["supcon_out"](z, labels, 0.1).value
    second = IN_PAIRS["supcon_out"](z[order], labels[order], 0.1).value
    torch.testing.assert_close(first[order], second, rtol=1e-12, atol=1e-12)


@every
def test_one_tile_after_another_takes_the_same_memory(name, small, monkeypatch):
    """However many tiles there are, and however many of their rows share a class: no name for each of them."""
    small("tiles")
    names = set()
    of = tiles.Buffers.of
    monkeypatch.setattr(
        tiles.Buffers, "of", lambda self, name, shape: names.add(name) or of(self, name, shape)
    )
    found = []
    for count in (20, 60):
        classes = torch.arange(count) ** 2 // 60  # of many sizes
        values_and_gradient(name, rows_of(count), classes, 0.1)
        found.append(len(names))
    assert found[1] == found[0]
