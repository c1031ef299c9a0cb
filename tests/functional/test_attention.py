"""CoNe's terms in pieces of the bank equal the plain functions; the errors of half precision are bounded."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize, one_hot

from nearkin import functional as F
from nearkin.functional import _bank_attention as attention
from nearkin.functional._bank_attention import Memory, bank_attention

OPTIONS = {"query_temperature": 0.1, "key_temperature": 0.07, "topk": 6}


def case(anchors=10, entries=50, classes=4, dim=6, filled=None, mixed=False, dtype=torch.float64):
    """Query, key, labels, ids and a memory; every third anchor has copies of its image in the bank."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    labels = torch.randint(classes, (anchors,), generator=draw)
    own = torch.randint(classes, (entries, 2), generator=draw)
    weights = torch.rand(entries, 1, generator=draw, dtype=torch.float64)
    ids = torch.randint(3 * anchors, (entries, 2), generator=draw)
    if not mixed:
        own, weights = own[:, :1].expand(-1, 2).clone(), torch.ones_like(weights)
        ids[:, 1] = -1
    if filled is not None:
        own[filled:] = ids[filled:] = -1
    soft = 0.7 * one_hot(labels, classes) + 0.3 * one_hot(labels.roll(1), classes)
    mine = torch.stack([torch.arange(anchors), torch.arange(anchors).roll(1)], 1)
    memory = Memory(
        normalize(normal(entries, dim), dim=1).to(dtype),
        own,
        torch.cat([weights, 1 - weights], 1),
        ids,
        normal(classes, entries).softmax(0).to(dtype),
    )
    query, key = normalize(normal(anchors, dim), dim=1), normalize(normal(anchors, dim), dim=1)
    return query, key, soft if mixed else labels, mine if mixed else mine[:, 0], memory


def plain(query, key, labels, ids, memory):
    """The public functions, and the mask by a loop."""
    mask = torch.tensor(
        [
            [
                bool(m[0] >= 0) and not ({*i} & {*e})
                for m, e in zip(memory.labels.tolist(), theirs, strict=True)
            ]
            for theirs in [[[x for x in e if x >= 0] for e in memory.ids.tolist()]]
            for i in ids.view(len(ids), -1).tolist()
        ]
    )
    keys, probabilities = memory.keys.to(query.dtype), memory.probabilities.T.to(query.dtype)
    pairs = F.SoftPairs(memory.labels, memory.weights)
    near = F.neighbour_nll(query, labels, keys, pairs, temperature=0.1, topk=6, mask=mask)
    return near, F.neighbour_target(key, keys, probabilities, temperature=0.07, mask=mask)


def gradient(function, query, *rest):
    """Value, validity, target, and the gradient of a sum that weighs every anchor differently."""
    leaf = query.clone().requires_grad_()
    near, target = function(leaf, *rest)
    weights = torch.linspace(-1, 2, len(query), dtype=query.dtype)
    (slope,) = torch.autograd.grad((near.value * weights).sum(), leaf)
    return near.value.detach(), near.valid, target, slope


def ours(query, key, labels, ids, memory):
    return bank_attention(query, key, labels, ids, memory, **OPTIONS)


CASES = {
    "hard": {},
    "mixed": {"mixed": True},
    "half empty": {"filled": 20},
    "fewer than k": {"filled": 4, "mixed": True},
    "empty": {"filled": 0},
    "by groups": {"entries": 16 * 9 + 5},
    "many anchors": {"anchors": 150, "entries": 131, "mixed": True},
    "one": {"anchors": 1, "entries": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [1, 7, 2048])
def test_as_the_plain_functions(name, piece, monkeypatch):
    monkeypatch.setattr(attention, "KEYS", piece)
    monkeypatch.setattr(attention, "CLASSES", 3)
    monkeypatch.setattr(attention, "NEAR", 40)
    x = case(**CASES[name])
    expected, found = gradient(plain, *x), gradient(ours, *x)
    assert torch.equal(found[1], expected[1])
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point():
            assert (a - b).norm() <= 1e-12 * b.norm() + 1e-14


@pytest.mark.parametrize("piece", [1, 7, 2048])
def test_a_bank_of_a_narrower_type_is_cast_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(attention, "KEYS", piece)
    monkeypatch.setattr(attention, "CLASSES", 3)
    x = case(entries=149, mixed=True, dtype=torch.float32)
    for a, b in zip(gradient(ours, *x), gradient(plain, *x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(20))
def test_own_copies_are_masked(seed):
    """Ids with gaps, adjacent, the same for several anchors, the largest, and none, on one or both sides."""
    draw = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1, 0, 1, 2, 5, 7, 8, 2**31 - 2, 2**31 - 1])
    query, key, labels, _, memory = case(entries=90, filled=80)
    own = choices[torch.randint(len(choices), (len(query), 2), generator=draw)]
    theirs = choices[torch.randint(len(choices), (90, 2), generator=draw)]
    theirs[torch.arange(0, 90, 3), 1] = -1
    for ids in (own, own[:, 0]):
        x = query, key, labels, ids, memory._replace(ids=theirs)
        for a, b in zip(gradient(ours, *x), gradient(plain, *x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_gradient_is_that_of_finite_differences(mixed):
    query, *rest = case(mixed=mixed, entries=40)
    assert gradcheck(lambda q: ours(q, *rest).neighbours.value, [query.requires_grad_()])


def test_anchors_without_an_entry_are_invalid_and_pull_on_nothing():
    x = list(case(anchors=3, entries=4))
    x[4] = x[4]._replace(ids=torch.tensor([[0, -1]] * 4))
    value, valid, target, slope = gradient(ours, *x)
    assert valid.tolist() == [False, True, True]
    assert value[0] == 0
    assert (target[0] == 0).all()
    assert (slope[0] == 0).all()
    torch.testing.assert_close(target[1:].sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1 / 60])
def test_a_steep_attention_neither_overflows_nor_vanishes(temperature):
    """Scores up to 1 000, in float32, whose range ends at e^88; at last no anchor has an entry."""
    query, key, labels, ids, memory = case(anchors=8, entries=300)
    lonely = torch.tensor([[0, -1]]).expand(300, -1)
    for stored, own in ((memory, ids), (memory._replace(ids=lonely), torch.zeros_like(ids))):
        single = stored._replace(
            keys=stored.keys.float(), probabilities=stored.probabilities.float()
        )
        options = OPTIONS | {"key_temperature": temperature}
        _, target = bank_attention(query.float(), key.float(), labels, own, single, **options)
        mask = stored.ids[:, 0] != own[:, None]
        scores = (key @ stored.keys.T / temperature).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(1).nan_to_num(0) @ stored.probabilities.T
        torch.testing.assert_close(target, weights.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("products", "bounds"), [(False, (5e-4, 2e-3, 2e-2)), (True, (5e-4, 5e-3, 3e-2))]
)
def test_what_half_precision_costs(products, bounds, monkeypatch):
    """Against float64 on the unrounded bank: 4 096 entries, 100 classes, ten seeds of anchors near their class."""
    monkeypatch.setattr(attention, "multiplies_bf16", lambda device: products)
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(100, 64, generator=draw)
    labels = torch.randint(100, (4096,), generator=draw)
    keys = normalize(centres[labels] + 0.9 * torch.randn(4096, 64, generator=draw), dim=1)
    logits = 6 * keys @ normalize(centres, dim=1).T
    memory = Memory(
        keys.double(),
        labels[:, None].expand(-1, 2),
        torch.tensor([[1.0, 0.0]]).expand(4096, -1),
        torch.arange(4096)[:, None].expand(-1, 2),
        logits.double().softmax(1).T.contiguous(),
    )
    half = memory._replace(keys=keys.bfloat16(), probabilities=memory.probabilities.bfloat16())
    options = {"query_temperature": 0.1, "key_temperature": 0.07, "topk": 128}
    worst = [0.0, 0.0, 0.0]
    for _ in range(10):
        own = torch.randint(100, (64,), generator=draw)
        rows = normalize(centres[own] + 0.9 * torch.randn(64, 64, generator=draw), dim=1)
        ids = torch.full((64,), -1)
        found = []
        for z, bank in ((rows.double(), memory), (rows, half)):
            leaf = z.clone().requires_grad_()
            near, target = bank_attention(leaf, leaf, own, ids, bank, **options)
            total = F.mean_valid(near)
            found.append([total.detach(), target, torch.autograd.grad(total, leaf)[0]])
        for i, (exact, rounded) in enumerate(zip(*found, strict=True)):
            worst[i] = max(worst[i], float((rounded - exact).norm() / exact.norm()))
    print(
        f"relative error of loss {worst[0]:.1e}, target {worst[1]:.1e}, query gradient {worst[2]:.1e}"
    )
    assert all(error < bound for error, bound in zip(worst, bounds, strict=True))
    assert not products or worst[1] > 1e-3, "the products were not in bf16"


@pytest.mark.parametrize("name", CASES)
def test_products_in_half_precision_mask_and_choose_alike(name, monkeypatch):
    """Stored in bf16, multiplied in bf16 or in float32: the same anchors count, and values are close."""
    query, key, labels, ids, memory = case(**CASES[name])
    half = memory._replace(
        **{n: getattr(memory, n).bfloat16() for n in ("keys", "probabilities")},
        weights=memory.weights.float(),
    )
    monkeypatch.setattr(attention, "MANY", 1)
    found = []
    for products in (False, True):
        monkeypatch.setattr(attention, "multiplies_bf16", lambda device, p=products: p)
        found.append(gradient(ours, query.float(), key.float(), labels, ids, half))
    (value, valid, target, slope), (value16, valid16, target16, slope16) = found
    assert torch.equal(valid, valid16)
    torch.testing.assert_close(target16, target, atol=0.02, rtol=0.05)
    for rough, fine in ((value16, value), (slope16, slope)):
        assert rough.isfinite().all()
        assert (
            rough - fine
        ).norm() <= 0.2 * fine.norm() + 1e-6  # another neighbour may be the last


def test_a_small_bank_is_multiplied_in_float32(monkeypatch):
    """Rounding its products to bf16 would cost digits and save nothing."""
    query, key, labels, ids, memory = case(anchors=4, entries=attention.MANY - 1)
    half = memory._replace(
        keys=memory.keys.bfloat16(), probabilities=memory.probabilities.bfloat16()
    )
    targets = []
    for products in (False, True):
        monkeypatch.setattr(attention, "multiplies_bf16", lambda device, p=products: p)
        targets.append(ours(query.float(), key.float(), labels, ids, half).target)
    assert torch.equal(*targets)
    monkeypatch.setattr(attention, "MANY", attention.MANY - 1)
    assert not torch.equal(targets[0], ours(query.float(), key.float(), labels, ids, half).target)


def test_float64_never_multiplies_in_half_precision(monkeypatch):
    monkeypatch.setattr(attention, "MANY", 1)
    monkeypatch.setattr(attention, "multiplies_bf16", lambda device: True)
    query, key, labels, ids, memory = case()
    rounded = memory._replace(keys=memory.keys.bfloat16())
    as64 = rounded._replace(keys=rounded.keys.double())
    expected, found = (gradient(ours, query, key, labels, ids, m) for m in (as64, rounded))
    assert all(torch.allclose(a.double(), b.double()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [16, 160, 1600])
@pytest.mark.parametrize("count", [1, 5, 60, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "all masked"])
def test_the_largest_by_groups_are_those_of_topk(rows, count, kind):
    scores = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows))
    if kind == "ties":
        scores = scores.round()
    if kind == "masked":
        scores[::3] = -torch.inf
    if kind == "all masked":
        scores[:] = -torch.inf
    values, index = attention.largest(scores, count)
    assert torch.equal(scores.T.gather(1, index), values)
    assert all(len(set(row.tolist())) == len(row) for row in index)
    expected = scores.T.topk(min(count, rows), dim=1).values
    assert torch.equal(values.sort(1, descending=True).values, expected)


def test_nothing_of_the_size_of_the_bank_is_kept():
    query, *rest = case(anchors=20, entries=3000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        near = ours(query.requires_grad_(), *rest).neighbours
        F.mean_valid(near)
    assert kept
    assert max(kept) <= query.numel()


@pytest.mark.parametrize(
    "wrong", [{"topk": 0}, {"key_temperature": 0.0}, {"query_temperature": -1.0}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bank_attention(*case(), **(OPTIONS | wrong))
