"""Large batches: tiles give what the matrices give, at any size, temperature and labels."""

import math

import pytest
import torch
from functional_cases import SOFT, differentiated, make, mixed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn.functional import normalize, one_hot

from nearkin import functional as F
from nearkin.functional import _pairs as pairs
from nearkin.functional._pairs import tiled, tiles

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
    "sigsup": lambda z, y, t: F.sigsup(z, y, log_scale=-math.log(t), bias=-0.5 / t),
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
    """Tiles of 8 x 4 from the first sample on, in the type of the features; "wide": in float64."""

    def use(path):
        monkeypatch.setattr(pairs, "LARGE", 0)
        monkeypatch.setattr(pairs, "STEEPEST", dict.fromkeys(pairs.STEEPEST, 1000.0))
        if path == "wide":
            monkeypatch.setitem(pairs.STEEPEST, torch.float32, -1.0)
        monkeypatch.setattr(tiles, "SHAPE", (8, 4))

    return use


paths = pytest.mark.parametrize("path", ["tiles", "wide"])


def close(found, expected, relative):
    assert torch.equal(found[1], expected[1])
    for a, b in ((found[0], expected[0]), (found[2], expected[2])):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= relative * b.norm() + 1e-14


# Two samples with smoothed labels share 1 / 350 of what each shares with itself: 12 digits cannot be left in float64.
KINDS_AND_COUNTS = [(k, n) for k in KINDS for n in (2, 22, 24) if (k, n) != ("smoothed", 2)]


@every
@pytest.mark.parametrize(("kind", "count"), KINDS_AND_COUNTS)
def test_as_from_matrices(name, kind, count, small):
    z, labels = rows_of(count), labels_of(kind, count)
    expected = values_and_gradient(name, z, labels, 0.1)
    small("tiles")
    close(values_and_gradient(name, z, labels, 0.1), expected, 1e-12)


@pytest.mark.parametrize("name", [n for n in IN_PAIRS if n != "instance_nce"])
def test_a_single_sample(name, small):
    expected = values_and_gradient(name, rows_of(1), torch.tensor([4]), 0.1)
    small("tiles")
    close(values_and_gradient(name, rows_of(1), torch.tensor([4]), 0.1), expected, 0)


@every
@pytest.mark.parametrize("kind", ["some", "mixed"])
def test_the_gradient_is_that_of_finite_differences(name, kind, small):
    small("tiles")
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


@pytest.mark.parametrize("name", ["supcon_out", "sincere", "orthogonal_projection"])
def test_smoothed_labels_without_positives_in_float32(name, monkeypatch):
    """512 samples of 4 000 classes: each shares 6 times more with itself than with all others together."""
    z, labels = rows_of(512, dim=16), 0.9 * torch.eye(512, 4000, dtype=torch.float64) + 0.1 / 4000
    monkeypatch.setattr(pairs, "LARGE", 1000)
    expected = values_and_gradient(name, z, labels, 0.1)
    monkeypatch.setattr(pairs, "LARGE", 0)
    found = values_and_gradient(name, z.float(), labels.float(), 0.1)
    close(tuple(x.double() if x.is_floating_point() else x for x in found), expected, 1e-5)


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


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_type_of_the_tiles(device):
    """Matrices for few samples; float64 where an unshifted exponential could overflow or vanish in float32."""
    large = pairs.LARGE if device == "cpu" else pairs.LARGE_ON_GPU
    wide = None if device == "mps" else torch.float64  # which has no float64
    with FakeTensorMode():
        few, many = (torch.empty(count, 6, device=device) for count in (large - 1, large))
        assert pairs._tile_dtype(few, 10.0) is None
        for steepness, expected in (
            (69.0, torch.float32),
            (71.0, wide),
            (689.0, wide),
            (691.0, None),
        ):
            assert pairs._tile_dtype(many, steepness) == expected
        if device != "mps":
            assert pairs._tile_dtype(many.double(), 71.0) == torch.float64


def test_the_steepest_term_decides_the_type(monkeypatch):
    found = []
    monkeypatch.setattr(pairs, "LARGE", 0)
    monkeypatch.setattr(tiled, "sums", lambda z, *_: found.append(z.dtype) or ())
    z, labels = rows_of(4, torch.float32), labels_of("distinct", 4)
    for temperature, scale in ((0.1, 6.9), (0.015, 1.0), (0.1, 7.1), (0.014, 1.0)):
        terms = pairs.LogSum("others"), pairs.LogSum("negatives", scale)
        pairs.pair_sums(z, labels, temperature, *terms)
    assert found == [torch.float32] * 2 + [torch.float64] * 2


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
    if name == "supcon_out" and kind != "distinct":
        similarity = z[few].double() @ z.double().T / 0.1
        mean = (similarity * shared).sum(1) / shared.sum(1).clamp(min=1)
        similarity[torch.arange(len(few)), few] = -torch.inf
        wanted = (similarity.logsumexp(1) - mean) * valid[few]
        torch.testing.assert_close(value[few].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["some", "mixed"])
def test_tiles_give_the_gradients_of_scale_and_bias(kind, small):
    z, labels = rows_of(22), labels_of(kind, 22)

    def gradients():
        numbers = [torch.tensor(n, dtype=z.dtype, requires_grad=True) for n in (2.0, -3.0)]
        losses = F.sigsup(z, labels, log_scale=numbers[0], bias=numbers[1])
        return torch.autograd.grad(F.mean_valid(losses), numbers)

    expected = gradients()
    small("tiles")
    torch.testing.assert_close(gradients(), expected, rtol=1e-12, atol=0)


def test_large_batches_are_differentiated_once(small):
    small("tiles")
    z = rows_of(10).requires_grad_()
    total = F.mean_valid(F.supcon_out(z, labels_of("some", 10), temperature=0.1))
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(total, z, create_graph=True)


def test_memory_grows_with_the_samples_and_not_with_their_pairs():
    """No tensor larger than a tile or the features: counted through every operation, both passes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor):
                    self.size = max(self.size, each.numel())
            return out

    z = rows_of(4 * pairs.LARGE, torch.float32).requires_grad_()
    labels = labels_of("some", len(z))
    for name in IN_PAIRS:
        with Largest() as largest:
            F.mean_valid(IN_PAIRS[name](z, labels, 0.1)).backward()
        assert largest.size <= max(math.prod(tiles.SHAPE), z.numel()), name
    assert len(z) ** 2 > 3 * largest.size


def test_soft_labels_are_sorted_too(small):
    """The order of the batch comes back: value and gradient follow a permutation."""
    z, labels = rows_of(24), mixed([0, 1, 2, 3] * 6, list(range(23, -1, -1)), 0.7)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    small("tiles")
    first = IN_PAIRS["supcon_out"](z, labels, 0.1).value
    second = IN_PAIRS["supcon_out"](z[order], labels[order], 0.1).value
    torch.testing.assert_close(first[order], second, rtol=1e-12, atol=1e-12)
