"""What a stage starts with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nearkin.config import RunConfig
from nearkin.distributed import Runtime
from nearkin.teacher import TEACHER_SALT
from nearkin.training.checks import CollapseWatch
from nearkin.training.loop import legs
from nearkin.training.metrics_log import Meters
from nearkin.training.optim import lr_factor
from nearkin.training.prepare import prepare
from nearkin.training.trainer import Trainer, balanced_weights
from nearkin.types import Progress


def session_of(tmp_path, config, precision="fp32"):
    runtime = Runtime(device="cpu", precision=precision)
    small = {"model": "test_resnet", "epochs": 2, "batch_size": 32, "threads": 1}
    config = config.model_copy(update=small | {"images_per_class": 10})
    return Trainer(prepare(config, runtime), runtime, tmp_path, quiet=True)


def first_step(trainer, leg):
    """Take the first step of a leg."""
    for batch in trainer._loader(leg.stage, leg.first, leg.first + 1):
        progress = Progress(leg.stage.name, 0, leg.last - leg.first, 0, 1)
        trainer.stepper.step(batch, progress, leg.first)


@pytest.mark.parametrize(("limit", "clipped"), [(0.01, True), (1e6, False)])
def test_the_gradient_is_clipped_to_its_limit(tmp_path, limit, clipped):
    trainer = session_of(tmp_path, RunConfig(objective="ce", clip_grad=limit))
    (leg,) = legs(trainer.stages, 2, trainer.steps_per_epoch)
    trainer.stepper.begin(leg.stage)
    norms = []

    def measure(*_):
        gradients = [p.grad.norm() for p in trainer.stepper.network.parameters()]
        norms.append(torch.stack(gradients).norm().item())

    trainer.stepper.optimizer.register_step_pre_hook(measure)
    first_step(trainer, leg)
    assert norms[0] == pytest.approx(limit, rel=1e-3) if clipped else 0.01 < norms[0] < limit


def test_a_new_stage_averages_from_its_own_start(tmp_path):
    """After the first step of every stage the average is the mean of the start and of the weights now."""
    config = RunConfig(objective="supcon", options={"mode": "two-stage"}, ema=0.999)
    trainer = session_of(tmp_path, config)
    stepper = trainer.stepper
    for leg in legs(trainer.stages, 2, trainer.steps_per_epoch):
        stepper.begin(leg.stage)
        start = {n: p.detach().clone() for n, p in stepper.network.named_parameters()}
        first_step(trainer, leg)
        mean = dict(stepper.eval_network().named_parameters())
        moved = 0
        for name, now in stepper.network.named_parameters():
            assert torch.allclose(mean[name], (start[name] + now) / 2, atol=1e-6), name
            moved += not torch.equal(now, start[name])
        assert moved > 0


def test_a_stage_without_a_classifier_is_validated_by_its_training_images(tmp_path, monkeypatch):
    config = RunConfig(objective="supcon", options={"mode": "two-stage"})
    trainer = session_of(tmp_path, config)
    trainer.stepper.begin(trainer.stages[0])
    asked, knn = [], trainer.evaluator.knn
    monkeypatch.setattr(trainer.evaluator, "knn", lambda *a: asked.append(a) or knn(*a))
    trainer._validate()
    ((network, train, split),) = asked
    splits = trainer.dataset.splits
    assert network is trainer.stepper.network
    assert train is splits["train"]
    assert split is splits["val"]


def test_balanced_weights_are_the_inverse_of_the_images_of_a_class():
    split = SimpleNamespace(labels=np.array([0, 0, 0, 2]))
    assert balanced_weights(split, 3).tolist() == pytest.approx([4 / 9, 0, 4 / 3])


def test_a_checkpoint_keeps_the_scale_of_the_gradient(tmp_path):
    """Of fp16; a run that starts again at the first scale would skip steps."""
    first, second = (
        session_of(tmp_path / name, RunConfig(objective="ce"), "fp16") for name in "ab"
    )
    for trainer in (first, second):
        trainer.stepper.begin(trainer.stages[0])
    scaler = first.runtime.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7})
    first.folder.mkdir()
    meters, collapse = Meters(first.runtime.device), CollapseWatch()
    assert first.saver.save(3, 0, meters, collapse) is None
    second.saver.restore(first.store.load(3), meters, collapse)
    assert second.runtime.scaler.state_dict() == scaler.state_dict()
    assert second.runtime.scaler.get_scale() == 128


def test_modules_are_put_into_training_mode_only_where_they_left_it(tmp_path, monkeypatch):
    """To visit every module takes milliseconds of each step."""
    trainer = session_of(tmp_path, RunConfig(objective="ce", freeze_batchnorm=True))
    (leg,) = legs(trainer.stages, 2, trainer.steps_per_epoch)
    stepper, network = trainer.stepper, trainer.stepper.network
    stepper.begin(leg.stage)
    visited, train = [], type(network).train
    monkeypatch.setattr(
        type(network), "train", lambda self, mode=True: visited.append(mode) or train(self, mode)
    )
    first_step(trainer, leg)
    assert visited == []
    network.eval()
    visited.clear()
    first_step(trainer, leg)
    assert visited == [True]
    norms = [m for m in network.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    assert network.backbone.training


def begun(tmp_path, config, number=0):
    """A trainer at the start of one of its stages, and the leg of that."""
    trainer = session_of(tmp_path, config)
    leg = legs(trainer.stages, 2, trainer.steps_per_epoch)[number]
    trainer.stepper.begin(leg.stage)
    return trainer, leg


@pytest.mark.parametrize(("crop", "read"), [("own", 1), ("same", 0)])
def test_a_teacher_reads_its_own_crop_or_that_of_the_student(tmp_path, crop, read):
    config = RunConfig(objective="cone", options={"teacher_crop": crop}, seed=5)
    trainer, leg = begun(tmp_path, config)
    seen, stepper = {}, trainer.stepper

    def note(name, network):
        network.register_forward_pre_hook(
            lambda module, args: seen.update({name: (args[0].clone(), module.key._key)})
        )

    note("teacher", stepper.teacher.network)
    note("student", stepper.network)
    (batch,) = trainer._loader(leg.stage, leg.first, leg.first + 1)
    assert len(batch.images) == read + 1
    stepper.step(batch, Progress(leg.stage.name, 0, leg.last, 0, 1), 0)
    (theirs, salted), (ours, key) = seen["teacher"], seen["student"]
    assert torch.equal(ours, batch.images[0])
    assert torch.equal(theirs, batch.images[read])
    assert read == 0 or not torch.equal(ours, theirs)
    assert (key[0], salted[0]) == (5, 5 ^ TEACHER_SALT)
    assert key[1:] == salted[1:]


@pytest.mark.parametrize(("batchnorm", "trains"), [("own", True), ("average", False)])
def test_the_teacher_of_a_stage_has_the_batchnorm_of_its_policy(tmp_path, batchnorm, trains):
    trainer, _ = begun(
        tmp_path, RunConfig(objective="cone", options={"teacher_batchnorm": batchnorm})
    )
    teacher = trainer.stepper.teacher
    assert (teacher.batchnorm, teacher.network.training) == (batchnorm, trains)


def test_the_momentum_of_a_teacher_follows_the_step_of_its_stage(tmp_path, monkeypatch):
    """A ramp: 1 - 1 / (k + 1) before forward pass k of the stage."""
    config = RunConfig(objective="attract-repulse", options={"teacher_schedule": "ramped"})
    trainer, leg = begun(tmp_path, config, number=1)
    given = []
    monkeypatch.setattr(
        trainer.stepper.teacher, "update", lambda _, momentum: given.append(momentum)
    )
    for done, batch in enumerate(trainer._loader(leg.stage, leg.first, leg.first + 3)):
        progress = Progress(leg.stage.name, done, 200, 0, 1)
        trainer.stepper.step(batch, progress, leg.first + done)
    assert given == pytest.approx([1 / 2, 2 / 3, 3 / 4])


def test_a_stage_shorter_than_the_warm_up_ends_at_its_floor_too(tmp_path):
    config = RunConfig(objective="ce", lr=0.2, warmup_epochs=9.0, min_lr_ratio=0.25)
    trainer, _ = begun(tmp_path, config)
    rates = []
    for step in range(8):
        trainer.stepper._set_lr(Progress("classify", step, 8, 0, 2))
        rates.append(trainer.stepper.lr)
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_the_rate_warms_up_over_epochs_and_ends_at_its_floor(tmp_path):
    config = RunConfig(objective="ce", lr=0.2, warmup_epochs=1.0, min_lr_ratio=0.25)
    trainer, leg = begun(tmp_path, config)
    epoch, steps = trainer.steps_per_epoch, leg.last
    assert epoch > 1
    for step in (0, epoch, steps - 1):
        (batch,) = trainer._loader(leg.stage, step, step + 1)
        trainer.stepper.step(batch, Progress("classify", step, steps, 0, 2), step)
        factor = lr_factor(step, steps=steps, warmup=epoch, floor=0.25)
        assert trainer.stepper.lr == pytest.approx(0.2 * factor)
        assert trainer.stepper.optimizer.param_groups[0]["lr"] == trainer.stepper.lr
    assert trainer.stepper.lr == pytest.approx(0.05)
