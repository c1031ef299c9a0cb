"""CoNe as a whole, against a loop over the equations of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nearkin.objectives import CoNe
from nearkin.types import Batch, Facts, Outputs, Progress

FACTS = Facts(dim=6, classes=3, images=40, batch_size=8)


def cone(**options):
    given = {"bank": 20, "topk": 5, "warmup_steps": 0, "embedding": 5, "hidden": 8} | options
    return CoNe(CoNe.Config(**given), dim=6, classes=3).double()


def outputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    logits = 2 * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return Outputs(embedding, embedding, None, logits)


def batch(first, labels):
    return Batch(torch.empty(0), torch.tensor(labels), torch.arange(len(labels)) + first)


def filled(**options):
    objective = cone(**options)
    for number in range(3):
        labels = [(number + i) % 3 for i in range(6)]
        objective.update(batch(6 * number, labels), outputs(6, 9), outputs(6, number))
    return objective


PROGRESS = Progress("neighbours", 10, 100, 1, 10)


def by_hand(entries, labels, ids, student, teacher, guard=False):
    """CE + 0.7 neighbours + 0.4 consistency, one anchor at a time."""
    z = student.embedding.numpy()
    keys, logits = teacher.embedding.numpy(), student.logits.numpy()
    totals = np.zeros(3)
    for i, label in enumerate(labels):
        p = np.exp(logits[i]) / np.exp(logits[i]).sum()
        usable = [e for e in entries if e["id"] != ids[i]]
        query, key = z[i] / np.linalg.norm(z[i]), keys[i] / np.linalg.norm(keys[i])
        near = sorted(usable, key=lambda e: -float(query @ e["key"]))[:5]
        weights = [math.exp(query @ e["key"] / 0.10) for e in near]
        mass = sum(w for w, e in zip(weights, near, strict=True) if e["label"] == label) / sum(
            weights
        )
        attention = [math.exp(key @ e["key"] / 0.07) for e in usable]
        target = sum(a * e["p"] for a, e in zip(attention, usable, strict=True)) / sum(attention)
        if not (guard and p.min() <= 1e-8):
            totals[0] -= math.log(p[label])
            totals[2] += float((target * np.log(target / p)).sum())
        totals[1] -= math.log(mass) if mass > 1e-8 else 0.0
    return totals / len(labels)


def entries_of():
    entries = []
    for number in range(3):
        teacher = outputs(6, number)
        for i in range(6):
            e, logit = teacher.embedding[i].numpy(), teacher.logits[i].numpy()
            entries.append(
                {
                    "key": e / np.linalg.norm(e),
                    "label": (number + i) % 3,
                    "p": np.exp(logit) / np.exp(logit).sum(),
                    "id": 6 * number + i,
                }
            )
    return entries


@pytest.mark.parametrize("first", [100, 3])
def test_equals_the_equations_with_own_copies_masked(first):
    objective, student, teacher = filled(), outputs(7, 77), outputs(7, 78)
    labels = [0, 1, 2, 0, 1, 2, 0]
    loss = objective(batch(first, labels), student, teacher, PROGRESS)
    ce, neighbour, consistency = by_hand(
        entries_of(), labels, [first + i for i in range(7)], student, teacher
    )
    assert loss.terms["ce"] == pytest.approx(ce, rel=1e-12)
    assert loss.terms["neighbour"] == pytest.approx(neighbour, rel=1e-12)
    assert loss.terms["consistency"] == pytest.approx(consistency, rel=1e-12)
    assert loss.total.item() == pytest.approx(ce + 1.5 * neighbour + consistency, rel=1e-12)


def test_masking_makes_a_difference():
    objective, student, teacher = filled(), outputs(7, 77), outputs(7, 78)
    labels = [0, 1, 2, 0, 1, 2, 0]
    strange = objective(batch(100, labels), student, teacher, PROGRESS).total
    own = objective(batch(3, labels), student, teacher, PROGRESS).total
    assert abs(strange - own) > 1e-6


def test_the_guard_leaves_certain_samples_out():
    student, teacher, labels = outputs(7, 77), outputs(7, 78), [0, 1, 2, 0, 1, 2, 0]
    student.logits[0] = torch.tensor([30.0, 0.0, 0.0])
    guarded = filled(guard=True)(batch(100, labels), student, teacher, PROGRESS)
    free = filled()(batch(100, labels), student, teacher, PROGRESS)
    ids = range(100, 107)
    expected = by_hand(entries_of(), labels, list(ids), student, teacher, guard=True)
    assert guarded.terms["ce"] == pytest.approx(expected[0], rel=1e-12)
    assert guarded.terms["consistency"] == pytest.approx(expected[2], rel=1e-12)
    assert guarded.total < free.total


def test_warms_up_on_cross_entropy_until_the_bank_is_full():
    objective = filled(warmup_steps=11)
    student, teacher = outputs(7, 77), outputs(7, 78)
    made = batch(100, [0, 1, 2, 0, 1, 2, 0])
    before = objective(made, student, teacher, PROGRESS)
    after = objective(made, student, teacher, PROGRESS._replace(step=11))
    assert before.total == before.terms["ce"]
    assert set(before.terms) == set(after.terms)
    assert after.total > before.total


def test_half_precision_does_not_overflow_in_the_warm_up():
    """Of many wide rows the sum is above 65 504, the largest float16."""
    objective = CoNe(CoNe.Config(bank=256, warmup_steps=5), dim=2048, classes=3, pretrained=True)
    rows = torch.rand(128, 2048, generator=torch.Generator().manual_seed(0)).half()
    student = Outputs(rows, rows, None, rows[:, :3])
    made = batch(0, [0, 1, 2, 0] * 32)
    assert torch.isfinite(objective(made, student, student, PROGRESS._replace(step=0)).total)


@pytest.mark.parametrize(
    ("images", "classes", "size", "bank", "topk", "warmup"),
    [
        (1294, 10, 32, 647, 161, 21),  # k: 8 * 647 / 10 = 517, at most 512, at most K / 4
        (1_281_167, 1000, 1024, 65_536, 512, 64),
        (20_000, 100, 128, 10_000, 512, 79),
        (100, 10, 64, 64, 16, 1),
        (10, 2, 8, 8, 2, 1),
    ],
)
def test_automatic_sizes(images, classes, size, bank, topk, warmup):
    facts = Facts(dim=512, classes=classes, images=images, batch_size=size)
    config = CoNe.Config().resolve(facts)
    assert (config.bank, config.topk, config.warmup_steps) == (bank, topk, warmup)
    assert (config.hidden, config.embedding) == (1024, 256)


@pytest.mark.parametrize(
    ("classes", "pretrained", "weights", "crop"),
    [
        (10, False, (1.5, 1.0), "own"),
        (100, False, (0.7, 1.0), "own"),
        (10, True, (0.7, 0.4), "same"),
        (100, True, (0.7, 0.4), "same"),
    ],
)
def test_weights_and_the_crop_of_the_teacher(classes, pretrained, weights, crop):
    facts = Facts(dim=8, classes=classes, images=999, batch_size=32, pretrained=pretrained)
    config = CoNe.Config().resolve(facts)
    assert (config.neighbour_weight, config.consistency_weight) == weights
    assert config.teacher_crop == crop


def test_the_warm_up_ends_with_the_first_epoch():
    """A bank that is larger than an epoch's batches fills no sooner."""
    facts = Facts(dim=8, classes=5, images=100, batch_size=32)
    assert CoNe.Config(bank=4096).resolve(facts).warmup_steps == 3
    assert CoNe.Config(bank=64).resolve(facts).warmup_steps == 2


@pytest.mark.parametrize(
    ("options", "pretrained", "reads", "classifier", "bank"),
    [
        ({}, False, "features", 6, 5),
        ({"classifier": "embedding"}, False, "embedding", 5, 5),
        ({}, True, "features", 6, 6),
        ({"attach": "features"}, False, "features", 6, 6),
        ({"attach": "projection"}, True, "features", 6, 5),
        ({"attach": "projection", "classifier": "embedding"}, True, "embedding", 5, 5),
    ],
)
def test_which_rows_are_contrasted_and_classified(options, pretrained, reads, classifier, bank):
    config = CoNe.Config(bank=8, embedding=5, hidden=7, **options)
    objective = CoNe(config, dim=6, classes=3, pretrained=pretrained)
    head = objective.heads["classifier"]
    assert (head.reads, head.module.in_features) == (reads, classifier)
    assert objective.bank.keys.shape == (8, bank)
    rows = torch.ones(2, 6)
    contrasted = objective.heads["projection"].module.eval()(rows)
    assert contrasted.shape == (2, bank)
    assert torch.equal(contrasted, rows) == (bank == 6)


def test_a_bank_larger_than_the_data_warms_up_for_one_epoch():
    config = CoNe.Config(bank=1000).resolve(FACTS)
    assert config.warmup_steps == 5  # 40 images, 8 a step


def test_constructed_alone_it_has_a_bank_of_4096_and_every_option_is_a_number():
    objective = CoNe(dim=512, classes=10)
    assert (len(objective.bank), objective.config.topk, objective.config.warmup_steps) == (
        4096,
        512,
        32,
    )
    assert "auto" not in objective.config.model_dump().values()
    assert objective.heads["classifier"].module.weight.shape == (10, 512)
    assert len(CoNe(CoNe.Config(bank=64), dim=8, classes=2).bank) == 64
    assert len(CoNe(dim=8, classes=2, images=1000, batch_size=10).bank) == 500
