"""What every objective must hold, built in or to come: parametrised over the registry."""

from __future__ import annotations

import copy
import math
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import nn

from nearkin.functional import PerAnchor
from nearkin.network import Network
from nearkin.objectives import Objective
from nearkin.objectives.base import combine
from nearkin.types import Batch, Outputs, Progress

DIM, CLASSES, SIZE = 12, 4, 16
SIZES = {"dim": DIM, "classes": CLASSES, "images": 64, "batch_size": SIZE}
# Options that change the mathematics; the defaults of an objective that is not listed are a case by themselves.
VARIANTS = {
    "attract-repulse": [{}, {"negatives": "bank"}, {"negatives": "bank", "attach": "features"}],
    "ce": [{}, {"loss": "bce", "smoothing": 0.1}],
    "cone": [
        {},
        {"guard": True},
        {"teacher_crop": "own"},
        {"attach": "features"},
        {"classifier": "features"},
    ],
    "gpaco": [{}, {"teacher_crop": "same", "smoothing": 0.1}, {"attach": "features"}],
    "sce": [{}, {"smoothing": 0.1}],
    "schane": [{}, {"hardness": 0.3, "positives": "sum"}, {"within": 4}, {"attach": "features"}],
    "sigsup": [
        {},
        {"mode": "two-stage"},
        {"normalise": "none", "views": 1},
        {"bias": -2.0, "attach": "features"},
    ],
    "sincere": [{}, {"views": 1}],
    "supcon": [
        {},
        {"mode": "two-stage"},
        {"variant": "in", "views": 1},
        {"mode": "two-stage", "attach": "features"},
    ],
    "varcon": [{}, {"attach": "features"}],
}


def made(name, options):
    kind = Objective.registry[name]
    return kind(kind.Config(**options), **SIZES)


CASES = [
    (name, options, stage)
    for name in sorted(Objective.registry)
    for options in VARIANTS.get(name, [{}])
    for stage in range(len(made(name, options).stages()))
]
LABELINGS = {
    "usual": torch.arange(SIZE) % CLASSES,
    "all the same": torch.zeros(SIZE, dtype=torch.int64),
    "one lone": torch.tensor([1] + [0] * (SIZE - 1)),
    "all distinct": torch.arange(CLASSES),
    "two": torch.tensor([0, 1]),
    "two alike": torch.tensor([2, 2]),
}


class Bench:
    """An objective with its network, a filled bank, and outputs for a batch."""

    def __init__(self, name, options, stage, dtype=torch.float32):
        torch.manual_seed(0)
        self.objective = made(name, options)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, DIM))
        heads, grey = self.objective.heads, (0.5,) * 3
        self.network = Network(backbone, heads, dim=DIM, mean=grey, std=grey)
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
        images = torch.rand(self.stage.views, len(labels), 3, 8, 8)
        return Batch(images, labels, torch.arange(len(labels)) + first)

    def seen(self, batch):
        student = self.network(batch.images[: self.stage.student_views].flatten(0, 1))
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(batch.images[-1])
        return batch, self.cast(student), self.cast(teacher)

    def double(self):
        """Everything in float64 and eval mode, for comparisons that rounding would blur."""
        self.dtype = torch.float64
        self.objective.double()
        for network in (self.network, self.teacher):
            if network is not None:
                network.double().eval()

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


def test_every_active_head_learns_and_no_other(bench):
    bench.loss(bench.batch(LABELINGS["usual"])).total.backward()
    for name, head in bench.network.heads.items():
        gradients = [p.grad for p in head.parameters()]
        learns = any(g is not None and g.abs().sum() > 0 for g in gradients)
        can_learn = bool(gradients)  # features that are contrasted as they are have no weights
        assert learns == (name in bench.stage.heads and can_learn), name
    trained = any(p.grad is not None for p in bench.network.backbone.parameters())
    assert trained != bench.stage.freeze_backbone


def test_forward_changes_no_state_and_terms_are_detached(bench):
    before = state(bench.objective)
    loss = bench.loss(bench.batch(LABELINGS["usual"]))
    assert same(before, state(bench.objective))
    assert loss.total.shape == ()
    for name, term in loss.terms.items():
        assert term.shape == (), name
        assert not term.requires_grad, name


def test_order_of_the_batch_does_not_matter(bench):
    if getattr(bench.objective.config, "within", None):
        pytest.skip("contrasts within blocks of the batch, by request")
    bench.double()
    batch = bench.batch(LABELINGS["usual"])
    order = torch.randperm(SIZE)
    mixed = Batch(batch.images[:, order], batch.labels[order], batch.index[order])
    assert torch.allclose(bench.loss(batch).total, bench.loss(mixed).total, rtol=1e-12)


def test_names_of_the_classes_do_not_matter(bench):
    """Renamed labels with the columns of the logits permuted along, in everything that holds labels."""
    names = torch.tensor([2, 0, 3, 1])
    assert len(names) == CLASSES
    bench.double()
    batch, student, teacher = bench.seen(bench.batch(LABELINGS["usual"]))
    before = bench.objective(batch, student, teacher, bench.progress).total
    for buffer, values in bench.objective.state_dict().items():
        if buffer.endswith("bank.labels"):
            values.copy_(names[values])
        if buffer.endswith("bank.probabilities") and len(values):
            values.copy_(values[names.argsort()])
    renamed = batch._replace(labels=names[batch.labels])
    after = bench.objective(
        renamed, columns(student, names), columns(teacher, names), bench.progress
    ).total
    assert torch.allclose(before, after, rtol=1e-12)


def columns(outputs, names):
    """Column names[c] of the new logits is column c of the old."""
    if outputs is None or outputs.logits is None:
        return outputs
    return outputs._replace(logits=outputs.logits[:, names.argsort()])


@pytest.mark.parametrize("labels", LABELINGS.values(), ids=LABELINGS)
def test_one_hot_rows_are_the_same_as_class_numbers(bench, labels):
    batch = bench.batch(labels)
    rows = nn.functional.one_hot(labels, CLASSES).float()
    bench.network.eval()
    hard, soft = bench.loss(batch), bench.loss(batch._replace(labels=rows))
    assert torch.equal(hard.total, soft.total)


def test_mixed_labels_lie_between_their_parts_or_are_at_least_finite(bench):
    batch = bench.batch(LABELINGS["usual"])
    one = nn.functional.one_hot(batch.labels, CLASSES).float()
    mixed = 0.7 * one + 0.3 * one.roll(1, 0)
    index = torch.stack([batch.index, batch.index.roll(1)], 1)
    loss = bench.loss(Batch(batch.images, mixed, index))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in bench.network.parameters() if p.requires_grad)


def test_saved_and_loaded_gives_the_same_next_loss(bench):
    other = type(bench.objective)(bench.objective.config, dim=DIM, classes=CLASSES)
    other.load_state_dict(bench.objective.state_dict())
    batch = bench.batch(LABELINGS["usual"])
    bench.network.eval()
    first = bench.loss(batch).total
    bench.objective = other
    assert torch.equal(first, bench.loss(batch).total)


def test_class_weights_reach_what_classifies(bench):
    """Linear in the weights: from 0 to 1 to 2 the loss takes equal steps; a stage without classifier ignores them."""
    bench.double()
    batch = bench.batch(LABELINGS["usual"])
    totals = []
    for weight in (0.0, 1.0, 2.0):
        bench.objective.weigh_classes(torch.full((CLASSES,), weight, dtype=torch.float64))
        totals.append(bench.loss(batch).total)
    assert torch.allclose(totals[2] - totals[1], totals[1] - totals[0], rtol=1e-9)
    assert (totals[1] != totals[0]) == bench.network.classifies


def test_class_weights_weigh_by_class(bench):
    if not bench.network.classifies:
        pytest.skip("this stage trains no classifier")
    bench.network.eval()
    batch = bench.batch(LABELINGS["all the same"])
    plain = bench.loss(batch).total
    bench.objective.weigh_classes(torch.tensor([1.0, 9.0, 9.0, 9.0]))
    binary = getattr(bench.objective.config, "loss", "") == "bce"  # asks about every class
    assert torch.allclose(bench.loss(batch).total, plain) != binary


def test_stages_share_all_epochs(bench):
    assert sum(stage.share for stage in bench.objective.stages()) == pytest.approx(1.0)


SAME = SIZE // CLASSES  # images of a class in the usual batch
ROWS, STRANGERS = 2 * SIZE, 2 * (SIZE - SAME)  # of two views
BANK = 32  # entries, evenly spread over the classes, none an own copy


def varcon_at_collapse():
    t = 0.1 - 0.02 + 2 * 0.02 / CLASSES
    own = 1 / (1 + (CLASSES - 1) * math.exp(-1 / t))
    other = own * math.exp(-1 / t)
    divergence = own * math.log(own * CLASSES) + (CLASSES - 1) * other * math.log(other * CLASSES)
    return divergence + math.log(CLASSES)


def gpaco_at_collapse():
    others, kin = (SIZE - 1) + SIZE + BANK, (SAME - 1) + SAME + BANK // CLASSES
    weight = 0.05 * kin
    return math.log(CLASSES + others * math.exp(5)) - weight * 5 / (1 + weight)


# What a network whose embeddings are all alike gives, from the equations with every cosine 1 and every logit 0.
AT_COLLAPSE = {
    "arcface": {"ce": math.log(1 + (CLASSES - 1) * math.exp(16 * math.sin(0.2)))},
    "attract-repulse": {
        "sce": math.log(CLASSES) - 0.0167 * math.log(1e-4) * (1 - 1 / CLASSES),
        "repulse": math.log(ROWS - 1),
    },
    "ce": {"ce": math.log(CLASSES)},
    "cone": {"ce": math.log(CLASSES)},
    "cosface": {"ce": math.log(1 + (CLASSES - 1) * math.exp(16 * 0.2))},
    "gpaco": {"gpaco": gpaco_at_collapse()},
    "opl": {"ce": math.log(CLASSES), "opl": 0.5},
    "sce": {"sce": 0.1 * math.log(CLASSES) - math.log(1e-4) * (1 - 1 / CLASSES)},
    "schane": {"ce": math.log(CLASSES), "schane": math.log(1 + STRANGERS)},
    # Scale 10 and bias -10: every score is 0.
    "sigsup": {
        "ce": math.log(CLASSES),
        "sigsup": (ROWS - 1) * math.log(2) / (2 * SAME - 1),
    },
    "sincere": {"ce": math.log(CLASSES), "sincere": math.log(1 + STRANGERS)},
    "supcon": {"ce": math.log(CLASSES), "supcon": math.log(ROWS - 1)},
    "triplet": {"ce": math.log(CLASSES), "triplet": 0.2},
    "varcon": {"ce": math.log(CLASSES), "varcon": varcon_at_collapse()},
}


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_every_objective_knows_its_value_for_constant_embeddings(name):
    bench = Bench(name, {}, 0)
    batch, student, teacher = bench.seen(bench.batch(LABELINGS["usual"]))
    before = state(bench.objective)
    found = bench.objective.at_collapse(batch, student, teacher, bench.progress)
    assert same(before, state(bench.objective))
    assert torch.isfinite(found.total)
    assert not found.total.requires_grad
    for term, value in AT_COLLAPSE.get(name, {}).items():
        assert float(found.terms[term]) == pytest.approx(value, rel=1e-4), term


@pytest.mark.parametrize("name", sorted(Objective.registry))
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([0, 1, CLASSES]), r"labels\[2\] is 4 but must be in \[0, 4\)"),
        (torch.tensor([-1, 0, 1]), r"labels\[0\] is -1"),
        (torch.full((3, CLASSES), 1.0), r"labels\[0\] sums to 4"),
        (torch.full((3, CLASSES + 1), 0.2), "5 columns but there are 4 classes"),
    ],
    ids=["from one", "negative", "several", "too many"],
)
def test_labels_of_no_class_are_refused(name, labels, text):
    """Their rows would be without a label, and the loss finite."""
    bench = Bench(name, {}, 0)
    with pytest.raises(ValueError, match=text):
        bench.loss(bench.batch(labels))


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_rows_of_three_classes_are_refused_where_two_are_read(name):
    bench = Bench(name, {}, 0)
    rows = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(3, -1)
    reads_two = name in ("arcface", "cone", "cosface", "gpaco", "triplet", "varcon")
    assert bench.objective.two_classes == reads_two
    if reads_two:
        with pytest.raises(ValueError, match=r"two largest of labels\[0\] sums to 0.8"):
            bench.loss(bench.batch(rows))
    else:
        assert torch.isfinite(bench.loss(bench.batch(rows)).total)


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_a_negative_number_of_an_image_is_refused(name):
    """A bank would not know the image's own copy by it."""
    bench = Bench(name, {}, 0)
    batch = bench.batch(LABELINGS["usual"])
    index = batch.index.clone()
    index[1] = -7
    with pytest.raises(ValueError, match=r"index\[1\] is -7 but must be at least 0"):
        bench.loss(batch._replace(index=index))
    partners = torch.stack([batch.index, torch.full_like(batch.index, -1)], 1)
    assert torch.isfinite(bench.loss(batch._replace(index=partners)).total)


@pytest.mark.parametrize("name", sorted(Objective.registry))
def test_a_stage_of_another_objective_is_refused(name):
    bench = Bench(name, {}, 0)
    bench.progress = bench.progress._replace(stage="pretrain")
    with pytest.raises(ValueError, match=f"has no stage 'pretrain'; it has {bench.stage.name}"):
        bench.loss(bench.batch(LABELINGS["usual"]))


@pytest.mark.parametrize(
    "name", [n for n in sorted(Objective.registry) if made(n, {}).stages()[0].teacher]
)
def test_a_missing_teacher_is_an_error(name):
    bench = Bench(name, {}, 0)
    batch, student, _ = bench.seen(bench.batch(LABELINGS["usual"]))
    with pytest.raises(ValueError, match="does the stage have a teacher"):
        bench.objective(batch, student, None, bench.progress)


def test_options_of_another_objective_are_refused():
    kinds = Objective.registry
    for wrong in ({"temperature": 1.0}, kinds["cone"].Config()):
        with pytest.raises(TypeError, match=r"must be a SupCon\.Config"):
            kinds["supcon"](wrong, **SIZES)


def test_losses_without_a_weight_are_refused():
    losses = PerAnchor(torch.ones(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"write ce=\(1\.0, losses\)"):
        combine(ce=losses)


def test_a_config_is_one_of_an_objective():
    with pytest.raises(TypeError, match=r"Bare\.Config must be a subclass of Objective\.Config"):

        class Bare(Objective):
            class Config:
                weight = 1.0


def test_a_name_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(Objective, "registry", dict(Objective.registry))
    with pytest.raises(TypeError, match="ce is the name of CrossEntropy already"):

        class Mine(Objective, name="ce"):
            pass

    for _ in range(2):  # a cell of a notebook that runs again

        class Own(Objective, name="own"):
            pass

    assert Objective.registry["own"] is Own


def test_heads_are_made_by_build():
    """A method of the name that the heads are kept under would never be called."""
    with pytest.raises(TypeError, match="`build` makes the heads"):

        class Mistaken(Objective):
            def heads(self, dim, classes):
                return {}


ATTACHED = sorted(
    name for name, kind in Objective.registry.items() if "attach" in kind.Config.model_fields
)


@pytest.mark.parametrize("name", ATTACHED)
def test_what_is_contrasted_follows_from_the_weights_that_a_run_starts_from(name):
    kind = Objective.registry[name]
    for pretrained, expected in ((False, "projection"), (True, "features")):
        objective = kind(kind.Config(), **SIZES, pretrained=pretrained)
        assert objective.config.attach == expected
        has_weights = any(True for _ in objective.heads["projection"].module.parameters())
        assert has_weights == (expected == "projection")
        given = kind(kind.Config(attach="projection"), **SIZES, pretrained=pretrained)
        assert given.config.attach == "projection"


def test_objectives_that_contrast_have_the_option():
    contrasting = "attract-repulse cone gpaco schane sigsup sincere supcon varcon"
    assert set(contrasting.split()) <= set(ATTACHED)


def test_a_collapsed_bank_gives_its_mean_as_the_target():
    bench = Bench("cone", {}, 0)
    found = bench.objective.at_collapse(
        *bench.seen(bench.batch(LABELINGS["usual"])), bench.progress
    )
    target = bench.objective.bank.probabilities.float().mean(1)
    divergence = (target * target.log()).sum() + target.sum() * math.log(CLASSES)
    assert torch.allclose(found.terms["consistency"], divergence, rtol=1e-4)


# Options that leave the loss of a batch as it is, and what they do instead; every other option changes it.
QUIET = {
    "contrast_share": "epochs of the first stage",
    "guard": "only of samples that the network is certain of (test_cone.py)",
    "teacher_batchnorm": "of the teacher's policy",
    "teacher_horizon": "of the teacher's policy",
    "teacher_lr": "of the second stage",
    "teacher_memory": "of the teacher's policy",
    "teacher_momentum": "of the teacher's policy",
    "teacher_schedule": "of the teacher's policy",
}
# Values that are tried where half the default, or another choice, would make no difference.
TRIED = {"ramp_epochs": 8.0, "warmup_steps": 100, "within": 4}
# Options without which another one has no effect.
NEEDED = {("attract-repulse", "bank"): {"negatives": "bank"}}
OPTIONS = [
    (name, option)
    for name in sorted(Objective.registry)
    for option in Objective.registry[name].Config.model_fields
]


def another(kind, config, option):
    """A value of the option that is not the one in `config`."""
    annotation, value = kind.Config.model_fields[option].annotation, getattr(config, option)
    if option in TRIED:
        return TRIED[option]
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice not in ("auto", value))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value // 2 if value > 1 else 2
    return value / 2 if value else 0.1


def losses(name, options):
    """Of the usual batch, in every stage."""
    found = []
    for stage in range(len(made(name, options).stages())):
        bench = Bench(name, options, stage)
        found.append(bench.loss(bench.batch(LABELINGS["usual"])).total.item())
    return found


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_reaches_the_loss_or_is_said_not_to(name, option):
    needed = NEEDED.get((name, option), {})
    value = another(Objective.registry[name], made(name, needed).config, option)
    before = losses(name, needed)
    assert before == losses(name, needed)
    assert (losses(name, needed | {option: value}) == before) == (option in QUIET)


def test_options_that_are_said_not_to_reach_the_loss_exist():
    assert set(QUIET) | set(TRIED) <= {option for _, option in OPTIONS}
    assert set(NEEDED) <= set(OPTIONS)
