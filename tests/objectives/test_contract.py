"""What every objective must hold, built in or to come: parametrised over the registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nearkin.network import Network
from nearkin.objectives import Objective
from nearkin.types import Batch, Facts, Outputs, Progress

DIM, CLASSES, SIZE = 12, 4, 16
FACTS = Facts(images=64, classes=CLASSES, batch_size=SIZE, image_size=8, dim=DIM)
VARIANTS = {
    "supcon": [{}, {"mode": "two-stage"}, {"variant": "in", "views": 1}],
    "cone": [{}, {"guard": True}, {"teacher_crop": "own"}],
}
CASES = [
    (name, options, stage)
    for name in sorted(Objective.registry)
    for options in VARIANTS.get(name, [{}])
    for stage in range(
        len(Objective.registry[name](Objective.registry[name].Config(**options)).stages())
    )
]
LABELINGS = {
    "usual": torch.arange(SIZE) % CLASSES,
    "all the same": torch.zeros(SIZE, dtype=torch.int64),
    "one lone": torch.tensor([1] + [0] * (SIZE - 1)),
}


class Bench:
    """An objective with its network, a filled bank, and outputs for a batch."""

    def __init__(self, name, options, stage, dtype=torch.float32):
        torch.manual_seed(0)
        kind = Objective.registry[name]
        self.objective = kind(kind.Config(**options).resolve(FACTS))
        heads = self.objective.heads(DIM, CLASSES)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, DIM))
        self.network = Network(backbone, heads, dim=DIM, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.stage = self.objective.stages()[stage]
        self.network.activate(self.stage.heads, self.stage.freeze_backbone)
        self.teacher = copy.deepcopy(self.network) if self.stage.teacher else None
        self.progress = Progress(self.stage.name, 50, 100, 5, 10)
        self.dtype = dtype
        for first in range(0, 64, SIZE):
            batch = self.batch(LABELINGS["usual"], first)
            with torch.no_grad():
                self.objective.update(*self.seen(batch))

    def batch(self, labels, first=100):
        torch.manual_seed(first)
        images = torch.rand(self.stage.views, SIZE, 3, 8, 8)
        return Batch(images, labels, torch.arange(SIZE) + first)

    def seen(self, batch):
        student = self.network(batch.images[: self.stage.student_views].flatten(0, 1))
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(batch.images[-1])
        return batch, self.cast(student), self.cast(teacher)

    def cast(self, outputs):
        if outputs is None or self.dtype == torch.float32:
            return outputs
        return Outputs(*(None if o is None else o.to(self.dtype) for o in outputs))

    def loss(self, batch):
        return self.objective(*self.seen(batch), self.progress)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def bench(request):
    return Bench(*request.param)


@pytest.mark.parametrize("labels", LABELINGS.values(), ids=LABELINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_loss_and_gradients(bench, labels, dtype):
    bench.dtype = dtype
    loss = bench.loss(bench.batch(labels))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    for name, parameter in bench.network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient, which DDP refuses"
            assert torch.isfinite(parameter.grad).all(), name


def test_every_active_head_learns(bench):
    bench.loss(bench.batch(LABELINGS["usual"])).total.backward()
    for name in bench.stage.heads:
        gradients = [p.grad for p in bench.network.heads[name].parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name


def test_forward_changes_no_state_and_terms_are_detached(bench):
    before = state(bench.objective)
    loss = bench.loss(bench.batch(LABELINGS["usual"]))
    assert same(before, state(bench.objective))
    assert loss.total.shape == ()
    for name, term in loss.terms.items():
        assert term.shape == (), name
        assert not term.requires_grad, name


def test_order_of_the_batch_does_not_matter(bench):
    bench.network.double().eval()
    if bench.teacher is not None:
        bench.teacher.double().eval()
    bench.objective.double()
    batch = bench.batch(LABELINGS["usual"])
    order = torch.randperm(SIZE)
    mixed = Batch(batch.images[:, order], batch.labels[order], batch.index[order])
    assert torch.allclose(bench.loss(batch).total, bench.loss(mixed).total, rtol=1e-12)


def test_one_hot_rows_are_the_same_as_class_numbers(bench):
    batch = bench.batch(LABELINGS["usual"])
    rows = nn.functional.one_hot(batch.labels, CLASSES).float()
    bench.network.eval()
    hard, soft = bench.loss(batch), bench.loss(batch._replace(labels=rows))
    assert torch.allclose(hard.total, soft.total, rtol=1e-6)


def test_saved_and_loaded_gives_the_same_next_loss(bench):
    other = type(bench.objective)(bench.objective.config)
    other.heads(DIM, CLASSES)
    other.load_state_dict(bench.objective.state_dict())
    batch = bench.batch(LABELINGS["usual"])
    bench.network.eval()
    first = bench.loss(batch).total
    bench.objective = other
    assert torch.equal(first, bench.loss(batch).total)


def test_class_weights_reach_the_cross_entropy(bench):
    if not any(
        bench.network.heads[name].out_features == CLASSES
        for name in bench.stage.heads
        if isinstance(bench.network.heads[name], nn.Linear)
    ):
        pytest.skip("this stage trains no classifier")
    bench.network.eval()
    batch = bench.batch(LABELINGS["usual"])
    plain = bench.loss(batch).terms["ce"]
    bench.objective.weigh_classes(torch.full((CLASSES,), 2.0))
    assert torch.allclose(bench.loss(batch).terms["ce"], 2 * plain)


def test_stages_share_all_epochs(bench):
    assert sum(stage.share for stage in bench.objective.stages()) == pytest.approx(1.0)
