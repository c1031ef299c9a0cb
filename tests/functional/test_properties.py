"""What must hold for any labels, any rows and any precision."""

import hypothesis.strategies as st
import pytest
import torch
from functional_cases import ALL, CLASSES, SOFT, differentiated, make
from hypothesis import HealthCheck, given, settings

from nearkin import functional as F

some = settings(
    max_examples=16,
    suppress_health_check=[HealthCheck.differing_executors],
)
hard = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=9)
weights = st.lists(st.integers(0, 4), min_size=CLASSES, max_size=CLASSES).filter(any)
soft = st.lists(weights, min_size=1, max_size=7).map(
    lambda rows: torch.tensor([[w / sum(row) for w in row] for row in rows], dtype=torch.float64)
)
seeds = st.integers(0, 2**20)
every = pytest.mark.parametrize("name", ALL)


def sample(name, labels, dtype, seed, copies=False):
    x = make(labels, dtype, seed)
    if copies:  # the first row again and again: coincident rows
        x = x._replace(features=x.features[:1].expand_as(x.features))
    return x


def draw_labels(data, name):
    return data.draw(st.one_of(hard, soft) if name in SOFT else hard)


@every
@some
@given(data=st.data(), seed=seeds)
def test_finite_value_and_gradient(name, data, seed):
    labels = draw_labels(data, name)
    dtype = data.draw(
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    )
    t = data.draw(st.sampled_from([0.01, 0.1, 1.0]))
    x = sample(name, labels, dtype, seed, copies=data.draw(st.booleans()))
    result, gradients = differentiated(ALL[name], x, t)
    assert result.value.isfinite().all()
    assert result.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (result.value[~result.valid] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


@every
@some
@given(data=st.data(), seed=seeds)
def test_permuting_the_samples_permutes_the_values(name, data, seed):
    labels = draw_labels(data, name)
    x = sample(name, labels, torch.float64, seed)
    order = torch.tensor(data.draw(st.permutations(range(len(x.labels)))))
    rows = ("features", "view2", "logits", "labels", "mask")
    moved = x._replace(**{field: getattr(x, field)[order] for field in rows})
    before, gradients = differentiated(ALL[name], x, 0.1)
    after, moved_gradients = differentiated(ALL[name], moved, 0.1)
    if name == "orthogonal_projection":
        positions = torch.tensor([0])
    elif name == "instance_nce":
        positions = torch.cat([order, order + len(order)])
    else:
        positions = order
    torch.testing.assert_close(after.value, before.value[positions])
    assert torch.equal(after.valid, before.valid[positions])
    for gradient, moved_gradient in zip(gradients, moved_gradients, strict=True):
        torch.testing.assert_close(moved_gradient, gradient[order])


@every
@some
@given(data=st.data(), seed=seeds)
def test_renaming_the_classes_changes_nothing(name, data, seed):
    """New names for the classes move the columns of logits, probabilities and class weights along."""
    labels = draw_labels(data, name)
    x = sample(name, labels, torch.float64, seed)
    names = torch.tensor(data.draw(st.permutations(range(CLASSES))))  # old class -> new class
    columns = names.argsort()
    renamed = x._replace(
        labels=x.labels[:, columns] if x.labels.ndim == 2 else names[x.labels],
        bank_labels=torch.where(x.bank_labels >= 0, names[x.bank_labels], -1),
        logits=x.logits[:, columns],
        bank_probs=x.bank_probs[:, columns],
        weight=x.weight[columns],
    )
    before, gradients = differentiated(ALL[name], x, 0.1)
    after, renamed_gradients = differentiated(ALL[name], renamed, 0.1)
    torch.testing.assert_close(after.value, before.value)
    assert torch.equal(after.valid, before.valid)
    torch.testing.assert_close(renamed_gradients[0], gradients[0])
    torch.testing.assert_close(renamed_gradients[2], gradients[2][:, columns])


@pytest.mark.parametrize("name", ["supcon_out", "schane", "varcon", "triplet_batch_hard"])
def test_class_numbers_need_not_be_dense(name):
    x = make([0, 0, 1, 1, 2])
    sparse = x._replace(labels=torch.tensor([10**9, 10**9, 7, 7, 0]))
    assert torch.equal(ALL[name](sparse, 0.1).valid, ALL[name](x, 0.1).valid)
    torch.testing.assert_close(ALL[name](sparse, 0.1).value, ALL[name](x, 0.1).value)


@some
@given(
    seed=seeds, topk=st.integers(1, 30), usable=st.lists(st.booleans(), min_size=12, max_size=12)
)
def test_more_neighbours_than_usable_entries_are_all_of_them(seed, topk, usable):
    x, mask = make([0, 1, 2], seed=seed), torch.tensor(usable)
    arguments = (x.features, x.labels, x.bank, x.bank_labels)
    few = F.neighbour_nll(*arguments, temperature=0.1, topk=max(topk, sum(usable)), mask=mask)
    every_entry = F.neighbour_nll(*arguments, temperature=0.1, topk=12, mask=mask)
    torch.testing.assert_close(few.value, every_entry.value)
    assert (few.valid == mask.any()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coincident_rows_of_other_classes_have_a_finite_triplet_gradient(dtype):
    x = make([0, 0, 1, 1], dtype)._replace(features=torch.eye(5, dtype=dtype)[[0, 0, 0, 0]])
    result, gradients = differentiated(ALL["triplet_batch_hard"], x, 0.1)
    torch.testing.assert_close(result.value, torch.full((4,), 0.3))
    assert gradients[0].abs().max() == 0
