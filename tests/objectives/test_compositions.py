"""What each objective makes of the functions, composed again by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import oracles
from nearkin import functional as F
from nearkin.bank import NeighbourBank
from nearkin.objectives import get
from nearkin.objectives.base import per_class
from nearkin.teacher import TeacherPolicy
from nearkin.training.optim import parameter_groups
from nearkin.types import Batch, Outputs, Progress

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3])
NOW = Progress("joint", 30, 100, 3, 10)


def rows(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


def outputs(count, seed=0):
    features, projection = rows(count, 6, seed), rows(count, 5, seed + 1)
    numbers = torch.tensor([2.0, -3.0]).double().expand(count, 2)
    return Outputs(features, features, projection, rows(count, 4, seed + 2), numbers)


def batch(labels=LABELS, views=1):
    count = len(labels)
    return Batch(torch.zeros(views, count, 1, 2, 2), labels, torch.arange(count))


def make(name, **options):
    kind = get(name)
    return kind(kind.Config(**options), dim=6, classes=4, images=64, batch_size=8).double()


def unit(tensor):
    return nn.functional.normalize(tensor, dim=1).numpy()


def mean(expected):
    """Of the valid anchors of an oracle."""
    value, valid = expected
    return np.asarray(value)[np.asarray(valid)].mean()


def ce(logits, labels):
    return mean(oracles.cross_entropy(logits.numpy(), labels.numpy()))


JOINT = {
    "supcon": (0.5, lambda z, y: oracles.supcon_out(z, y, 0.1)),
    "sigsup": (0.5, lambda z, y: oracles.sigsup(z, y, 2.0, -3.0)),
    "sincere": (0.5, lambda z, y: oracles.sincere(z, y, 0.1)),
    "varcon": (0.5, lambda z, y: oracles.varcon(z, y, 0.1, 0.02)),
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_contrast_adds_its_term_to_cross_entropy(name):
    weight, oracle = JOINT[name]
    seen, labels = outputs(16), LABELS.repeat(2)
    found = make(name)(batch(views=2), seen, None, NOW)
    contrast = mean(oracle(unit(seen.projection), labels.numpy()))
    assert float(found.total) == pytest.approx(
        ce(seen.logits, labels) + weight * contrast, rel=1e-6
    )
    assert float(found.terms[name]) == pytest.approx(contrast, rel=1e-6)
    assert int(found.counts["without_positive"]) == 0


def test_sigsup_starts_as_siglip_and_learns_scale_and_bias():
    """The numbers are a head: rows of it reach the loss, and weight decay leaves them out."""
    objective = make("sigsup")
    heads = {name: head.module for name, head in objective.heads.items()}
    numbers = heads["scale"](rows(3, 6))
    assert numbers.shape == (3, 2)
    assert numbers[2].tolist() == pytest.approx([math.log(10), -10.0], rel=1e-6)
    other = get("sigsup").Config(temperature=0.5, bias=2.0)
    start = get("sigsup")(other, dim=6, classes=4).heads["scale"].module
    assert start.log_scale.item() == pytest.approx(math.log(2))
    assert start.bias.item() == 2

    network = nn.ModuleDict({"backbone": nn.Linear(2, 2), "heads": nn.ModuleDict(heads)})
    options = {"weight_decay": 0.1, "decay_all": False, "layer_decay": 1.0}
    groups = parameter_groups(network, **options)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in heads["scale"].parameters()} <= undecayed


def test_anchors_without_a_positive_are_counted():
    lone = torch.tensor([0, 0, 1, 2, 3, 3, 3, 1])
    found = make("supcon", views=1)(batch(lone), outputs(8), None, NOW)
    assert int(found.counts["without_positive"]) == 1


def test_schane_mixes_the_two_terms():
    seen, labels = outputs(16), LABELS.repeat(2)
    contrast = mean(oracles.schane(unit(seen.projection), labels.numpy(), 0.5, 1.0, "mean"))
    found = make("schane")(batch(views=2), seen, None, NOW)
    assert float(found.total) == pytest.approx(
        0.9 * contrast + 0.1 * ce(seen.logits, labels), rel=1e-6
    )


def test_schane_within_blocks_is_what_each_device_would_do_alone():
    seen = outputs(16)
    found = make("schane", within=4)(batch(views=2), seen, None, NOW)
    expected = []
    for start in (0, 4):
        mine = [*range(start, start + 4), *range(8 + start, 12 + start)]  # both views
        z, y = unit(seen.projection[mine]), LABELS[start : start + 4].repeat(2).numpy()
        expected.append(mean(oracles.schane(z, y, 0.5, 1.0, "mean")))
    assert float(found.terms["schane"]) == pytest.approx(np.mean(expected), rel=1e-6)


def test_triplet_and_orthogonal_projection_read_the_features():
    seen = outputs(8)
    z, y = unit(seen.features), LABELS.numpy()
    triplet = mean(oracles.triplet_batch_hard(z, y, 0.2))
    opl = oracles.orthogonal_projection(z, y, 0.5)
    plain = ce(seen.logits, LABELS)
    assert float(make("triplet")(batch(), seen, None, NOW).total) == pytest.approx(plain + triplet)
    assert float(make("opl")(batch(), seen, None, NOW).total) == pytest.approx(plain + opl)


@pytest.mark.parametrize(
    ("name", "options"),
    [("cosface", {}), ("cosface", {"scale": 30.0}), ("arcface", {"margin": 0.4, "scale": 9.0})],
)
def test_margins_are_for_training_only(name, options):
    objective = make(name, **options)
    head = objective.heads["classifier"].module.double()
    features = rows(8, 6)
    with torch.no_grad():
        logits = head(features)
    weight = head.weight.detach()
    cosines = unit(features) @ unit(weight).T
    scale, margin = options.get("scale", 16.0), options.get("margin", 0.2)
    np.testing.assert_allclose(logits.numpy(), scale * cosines, rtol=1e-9)
    lowered = getattr(oracles, f"{name}_logits")(
        unit(features), weight.numpy(), LABELS.numpy(), margin, scale
    )
    now = NOW._replace(stage="classify")
    found = objective(batch(), Outputs(features, features, None, logits), None, now)
    expected = mean(oracles.cross_entropy(np.asarray(lowered), LABELS.numpy()))
    assert float(found.total) == pytest.approx(expected, rel=1e-6)


def test_sce_smooths_its_labels_and_follows_the_number_of_classes():
    seen = outputs(8)
    smooth = 0.8 * nn.functional.one_hot(LABELS, 4).double() + 0.2 / 4
    expected = mean(oracles.symmetric_ce(seen.logits.numpy(), smooth.numpy(), 0.1, 1.0))
    found = make("sce", smoothing=0.2)(batch(), seen, None, NOW._replace(stage="classify"))
    assert float(found.total) == pytest.approx(expected, rel=1e-6)
    many = get("sce")(dim=6, classes=100).config
    assert (many.alpha, many.beta) == pytest.approx((1.0, 0.1 / 6))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gpaco_contrasts_with_this_batchs_keys_and_never_with_an_own_earlier_copy(smoothing):
    objective = make("gpaco", bank=12, projection=5, smoothing=smoothing)
    student, teacher = outputs(8), outputs(8, seed=9)
    objective.update(batch(), student, outputs(8, seed=20))  # ids 0 to 7
    older = objective.bank.keys[:8].numpy()
    bank = np.concatenate([unit(teacher.projection), older])
    mask = np.concatenate([np.ones((8, 8), bool), ~np.eye(8, dtype=bool)], 1)
    expected = mean(
        oracles.gpaco(
            unit(student.projection),
            LABELS.numpy(),
            student.logits.numpy(),
            bank,
            np.concatenate([LABELS, LABELS]),
            0.05,
            0.2,
            smoothing,
            mask,
        )
    )
    found = objective(batch(), student, teacher, NOW)
    assert float(found.total) == pytest.approx(expected, rel=1e-6)


def test_mixed_images_count_for_both_classes_where_labels_are_hard():
    first, second = LABELS, LABELS.roll(1)
    one_hot = nn.functional.one_hot
    soft = 0.7 * one_hot(first, 4).double() + 0.3 * one_hot(second, 4).double()
    z = torch.from_numpy(unit(rows(8, 6)))

    def run(labels):
        return F.triplet_batch_hard(z, labels, margin=0.3)

    both, a, b = per_class(run, soft), run(first), run(second)
    share = torch.where(first == second, 1.0, 0.7).double()
    # Where both parts are one class that class has the whole weight.
    expected = share * a.value + torch.where(first == second, 0.0, 0.3).double() * b.value
    torch.testing.assert_close(both.value, expected)
    assert torch.equal(both.valid, a.valid | b.valid)


@pytest.mark.parametrize("name", ["ce", "schane", "supcon", "opl", "triplet"])
def test_labels_of_the_cross_entropy_are_smoothed(name):
    seen = outputs(8)
    objective = make(name, smoothing=0.2)
    now = NOW._replace(stage=objective.stages()[0].name)
    found = objective(batch(), seen, None, now).terms["ce"]
    expected = mean(oracles.cross_entropy(seen.logits.numpy(), LABELS.numpy(), smoothing=0.2))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def attract_repulse(stage, step, steps=100, epochs=10, **options):
    objective = make("attract-repulse", **options)
    seen = outputs(16 if stage == "contrast" else 8)
    progress = Progress(stage, step, steps, step * epochs // steps, epochs)
    teacher = outputs(8, seed=5) if stage == "mean-teacher" else None
    return objective(batch(views=2), seen, teacher, progress), seen, teacher


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (50, 0.55), (100, 0.1)])
def test_repulsion_falls_by_a_cosine(step, weight):
    options = {"beta": 0.5, "repulse": 1.0, "repulse_end": 0.1}
    found, seen, _ = attract_repulse("contrast", step, **options)
    z = unit(seen.projection)
    contrast = mean(oracles.instance_nce(z[:8], z[8:], 0.2))
    sce = mean(oracles.symmetric_ce(seen.logits.numpy(), LABELS.repeat(2).numpy(), 1.0, 0.5))
    assert float(found.total) == pytest.approx(sce + weight * contrast, rel=1e-6)
    constant, *_ = attract_repulse("contrast", step, trade_off="constant", **options)
    assert float(constant.total) == pytest.approx(sce + contrast, rel=1e-6)


@pytest.mark.parametrize(
    ("step", "weight"), [(0, math.exp(-5)), (25, math.exp(-1.25)), (50, 1.0), (90, 1.0)]
)
def test_trust_in_the_teacher_rises_over_five_epochs(step, weight):
    found, seen, teacher = attract_repulse("mean-teacher", step, beta=0.5)
    target = teacher.logits.softmax(1)
    divergence = mean(oracles.consistency_kl(seen.logits.numpy(), target.numpy()))
    sce = mean(oracles.symmetric_ce(seen.logits.numpy(), LABELS.numpy(), 1.0, 0.5))
    assert float(found.total) == pytest.approx(sce + weight * divergence, rel=1e-6)


def test_attract_repulse_smooths_the_labels_that_attract():
    found, seen, _ = attract_repulse("contrast", 0, smoothing=0.2, beta=0.5)
    smooth = 0.8 * nn.functional.one_hot(LABELS.repeat(2), 4).double() + 0.2 / 4
    sce = mean(oracles.symmetric_ce(seen.logits.numpy(), smooth.numpy(), 1.0, 0.5))
    assert float(found.terms["sce"]) == pytest.approx(sce, rel=1e-6)


def test_attract_repulse_reads_a_bank_of_teacher_keys_without_own_copies():
    objective = make("attract-repulse", negatives="bank", bank=12, projection=5)
    assert isinstance(objective.bank, NeighbourBank)
    objective.update(batch(), outputs(8), outputs(8, seed=20))
    student, teacher = outputs(8), outputs(8, seed=5)
    found = objective(batch(), student, teacher, Progress("contrast", 0, 100, 0, 10))
    mask = np.concatenate([~np.eye(8, dtype=bool), np.zeros((8, 4), bool)], 1)
    expected = oracles.instance_nce_bank(
        unit(student.projection), unit(teacher.projection), objective.bank.keys.numpy(), 0.2, mask
    )
    assert float(found.terms["repulse"]) == pytest.approx(mean(expected), rel=1e-6)


@pytest.mark.parametrize(
    "given", [("cosine", 2.0, 0.5, "average", "same"), ("constant", 0.7, 0.9, "own", "own")]
)
def test_cone_gives_its_teacher_the_options(given):
    names = ("schedule", "horizon", "momentum", "batchnorm", "crop")
    options = {f"teacher_{name}": value for name, value in zip(names, given, strict=True)}
    (stage,) = make("cone", **options).stages()
    assert stage.teacher == TeacherPolicy(**dict(zip(names, given, strict=True)))
    assert stage.views == (2 if given[-1] == "own" else 1)


@pytest.mark.parametrize("crop", ["same", "own"])
def test_gpaco_gives_its_teacher_the_options(crop):
    (stage,) = make("gpaco", teacher_horizon=2.0, teacher_crop=crop).stages()
    assert stage.teacher == TeacherPolicy(horizon=2.0, crop=crop)
    assert stage.views == (2 if crop == "own" else 1)


@pytest.mark.parametrize("schedule", ["constant", "ramped"])
def test_attract_repulse_gives_its_teachers_the_options(schedule):
    options = {"teacher_memory": 0.4, "teacher_schedule": schedule, "teacher_lr": 0.5}
    contrast, averaged = make("attract-repulse", contrast_share=0.2, **options).stages()
    assert contrast.teacher is None
    assert averaged.teacher == TeacherPolicy(schedule, share=0.4, batchnorm="average", crop="own")
    assert (contrast.share, averaged.share, averaged.lr) == (0.2, 0.8, 0.5)
    keys, _ = make("attract-repulse", negatives="bank", **options).stages()
    assert keys.teacher == TeacherPolicy(share=0.4, crop="own")


def test_contrast_takes_its_share_of_the_epochs():
    contrast, linear = make("supcon", mode="two-stage", contrast_share=0.25).stages()
    assert (contrast.share, linear.share) == (0.25, 0.75)


def test_the_mean_teacher_starts_from_the_best_weights_and_is_the_final_model(tmp_path):
    """One command, two stages, one model; the student's learning rate is a tenth in the second where that is given."""
    import nearkin

    result = nearkin.train(
        "digits",
        "attract-repulse",
        images_per_class=16,
        epochs=3,
        batch_size=16,
        model="test_resnet",
        threads=1,
        save_minutes=60,
        out=tmp_path / "run",
        **{"objective.contrast_share": 0.7, "objective.teacher_lr": 0.1},
    )
    last = max((result.run / "checkpoints").glob("step-*"))
    model, teacher = (
        load_file(result.run / "model.safetensors"),
        load_file(last / "teacher.safetensors"),
    )
    student = load_file(last / "network.safetensors")
    best = json.loads((last / "state.json").read_text())["state"]["best"]["step"]
    assert best == int(last.name.split("-")[1])  # a stage of one epoch has one candidate
    assert all(torch.equal(value, teacher[f"network.{key}"]) for key, value in model.items())
    assert not torch.equal(model["heads.classifier.weight"], student["heads.classifier.weight"])
    rates = {
        record["stage"]: record["lr"]
        for record in map(json.loads, (result.run / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "train" and record["epoch"] == 0
    }
    assert rates["mean-teacher"] < 0.2 * rates["contrast"]
