"""What is decided before the first step: schedules, legs, defaults."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from tests.training.settings_cases import data_settings, settings

from nearkin.config import RunConfig
from nearkin.doctor import features as doctor_features
from nearkin.errors import ConfigError
from nearkin.objectives import SCHaNe, Stage, SupCon
from nearkin.process import GPU_THREADS
from nearkin.teacher import TeacherPolicy, momentum_at
from nearkin.training import defaults
from nearkin.training.api import resolved
from nearkin.training.defaults import check, named_from_scratch, side_of_scaled
from nearkin.training.loop import legs
from nearkin.training.metrics_log import Meters
from nearkin.training.optim import lr_factor
from nearkin.types import Loss


def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor():
    values = [lr_factor(s, steps=100, warmup=10, floor=0.01) for s in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert values[10] == 1.0
    assert values[-1] == pytest.approx(0.01)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    middle = 10 + (100 - 1 - 10) / 2
    assert lr_factor(54, steps=100, warmup=10, floor=0) == pytest.approx(
        (1 + math.cos(math.pi * (54 - 10) / 89)) / 2
    )
    assert lr_factor(int(middle), steps=100, warmup=10, floor=0) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 5), (3, 3)])
def test_short_schedules_are_finite_and_positive(steps, warmup):
    for step in range(steps):
        assert 0 < lr_factor(step, steps=steps, warmup=min(warmup, steps), floor=1e-3) <= 1


def test_teacher_momentum():
    constant = TeacherPolicy(horizon=0.3)
    assert momentum_at(constant, 5, 1000, steps_per_epoch=100) == 1 - 1 / 30
    assert momentum_at(constant, 5, 1000, steps_per_epoch=10) == 1 - 1 / 8
    share = TeacherPolicy(share=0.1)
    assert momentum_at(share, 5, 1000, steps_per_epoch=10) == 1 - 1 / 100
    assert momentum_at(share, 5, 20, steps_per_epoch=10) == 1 - 1 / 8
    ramped = share._replace(schedule="ramped")
    found = [momentum_at(ramped, step, 1000, 10) for step in (0, 3, 5, 500)]
    assert found == [0, 0.75, 1 - 1 / 6, 1 - 1 / 100]
    cosine = TeacherPolicy(schedule="cosine")
    assert momentum_at(cosine, 0, 1000, 10) == pytest.approx(0.996)
    assert momentum_at(cosine, 500, 1000, 10) == pytest.approx(0.998)
    assert momentum_at(cosine, 1000, 1000, 10) == 1.0


@pytest.mark.parametrize(
    ("shares", "epochs", "expected"),
    [
        ([1.0], 12, [12]),
        ([0.8, 0.2], 10, [8, 2]),
        ([0.8, 0.2], 2, [1, 1]),
        ([0.99, 0.01], 5, [4, 1]),
        ([0.8, 0.2], 1, [0, 1]),
        ([1.0], 0, [0]),
        ([0.5, 0.5], 0, [0, 0]),
        ([0.1, 0.1, 0.8], 10, [1, 1, 8]),
    ],
)
def test_epochs_are_shared_among_stages(shares, epochs, expected):
    stages = tuple(Stage(str(i), share, ()) for i, share in enumerate(shares))
    route = legs(stages, epochs, steps_per_epoch=7)
    assert [(leg.last - leg.first) // 7 for leg in route] == expected
    assert route[0].first == 0
    assert route[-1].last == epochs * 7
    for before, after in pairwise(route):
        assert before.last == after.first


@pytest.mark.parametrize(
    ("device", "side", "options", "expected"),
    [
        ("cpu", 17, {}, "channels_last"),
        ("cpu", 16, {}, "contiguous"),
        ("cpu", 224, {"model": "vit_tiny_patch16_224"}, "contiguous"),
        ("cpu", 224, {"memory_format": "contiguous"}, "contiguous"),
        ("cuda", 16, {"model": "vit_tiny_patch16_224"}, "channels_last"),
        ("mps", 224, {}, "contiguous"),
    ],
)
def test_convolutions_compute_in_channels_last(device, side, options, expected):
    found = settings(1000, side, device, data="photos", **options)
    assert found.memory_format == expected


@pytest.mark.parametrize(
    ("crop", "side"), [("padded", 256), ("centre", 256), (1.0, 256), (0.35, 379), (0.08, 792)]
)
def test_scaled_jpegs_leave_random_regions_enough_pixels(crop, side):
    config = settings(1000, 500, data="photos", crop_scale=crop, decode="scaled")
    assert side_of_scaled(config) == side
    assert side_of_scaled(config) * (1.0 if isinstance(crop, str) else crop) ** 0.5 >= 224
    assert side_of_scaled(config) >= 224 / 0.875  # the short side in evaluation


def test_scaled_jpegs_are_not_cached():
    room = {"data": "x", "images": 500, "side": 32, "room": 2**30}
    assert data_settings(**room).cache == "ram"
    assert data_settings(**room, decode="scaled").cache == "off"
    both = data_settings(**room, decode="scaled", cache="disk")
    with pytest.raises(ConfigError, match="--decode scaled .* --cache disk .* use one of them"):
        check(both, images=500, world_size=1)


@pytest.mark.parametrize(
    ("images", "batch"), [(1294, 32), (3068, 64), (50_000, 128), (100, 16), (10, 8), (1, 1)]
)
def test_batch_is_the_power_of_two_nearest_to_a_48th(images, batch):
    assert settings(images, 32).batch_size == batch


@pytest.mark.parametrize(
    ("side", "given", "told"),
    [
        (300, {"model": "resnet18"}, True),
        (300, {"model": "resnet18", "from_scratch": True}, False),
        (300, {"model": "resnet18", "pretrained": True}, False),
        (300, {"from_scratch": True}, False),
        (32, {"model": "resnet18"}, False),
    ],
)
def test_a_named_model_with_random_weights_is_told_for_photos(side, given, told):
    found = settings(1000, side, data="photos", **given)
    assert named_from_scratch(RunConfig(**given), found) == told


def test_images_of_few_pixels_are_enlarged():
    """Icons and strips: below 4 px a side nothing learns."""
    found = data_settings(data="x", images=20, side=2)
    assert (found.image_size, found.eval_size) == (4, 4)


def test_defaults_follow_the_data():
    config = settings(1294, 8, data="digits")
    assert (config.model, config.epochs, config.image_size, config.flip) == (
        "resnet10t",
        12,
        8,
        False,
    )
    assert (config.optimizer, config.lr, config.weight_decay) == ("sgd", 0.2 * 32 / 256, 5e-4)
    assert config.warmup_epochs == pytest.approx(0.6)
    for files in (False, True):
        config = settings(200_000, 500, data="photos", files=files, from_scratch=files)
        assert (config.model, config.epochs, config.image_size, config.flip) == (
            "resnet18",
            30,
            224,
            True,
        )
        assert config.weight_decay == 1e-4
        assert (config.objective, config.sampler, config.minutes) == ("cone", "shuffle", 0)
        assert (config.pretrained, config.probe, config.blocks, config.head_lr) == (
            False,
            False,
            "all",
            1.0,
        )
    config = settings(5000, 64, model="vit_tiny_patch16_224")
    assert (config.optimizer, config.weight_decay) == ("adamw", 0.05)
    assert config.lr == pytest.approx(5e-4 * 128 / 256)
    assert (settings(5000, 64, augment="strong").mixup, settings(5000, 64).mixup) == (0.2, 0.0)


PHOTO_DEFAULTS = (
    "model",
    "pretrained",
    "objective",
    "image_size",
    "epochs",
    "minutes",
    "batch_size",
    "optimizer",
    "lr",
    "head_lr",
    "layer_decay",
    "blocks",
    "probe",
)


def photo_defaults(device="cpu", **options):
    config = settings(3068, 500, device, data="photos", files=True, **options)
    return {name: getattr(config, name) for name in PHOTO_DEFAULTS}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_doctor_reads_photos_as_training_does(device):
    """So that each finds the other's features."""
    config = settings(3068, 500, device, data="photos", files=True)
    assert (config.image_size, config.eval_size) == defaults.photo_sides(device)
    _, model, transform = doctor_features._pretrained(device)
    assert transform == defaults.eval_spec(config)
    assert model.image_size == config.image_size


def test_photos_start_from_pretrained_weights_unless_from_scratch(monkeypatch):
    monkeypatch.setattr(defaults, "TUNED_DECAY", 0.7)
    tuned = {
        "model": "tf_efficientnet_lite0",
        "pretrained": True,
        "objective": defaults.TUNED_OBJECTIVE,
        "image_size": defaults.TUNED_SIDE,
        "epochs": defaults.TUNED_EPOCHS,
        "minutes": 15,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": defaults.TUNED_LR,
        "head_lr": defaults.TUNED_HEAD_LR,
        "layer_decay": 1,
        "blocks": defaults.TUNED_BLOCKS,
        "probe": True,
    }
    assert photo_defaults() == tuned
    assert photo_defaults("cuda") == tuned | {"image_size": 224, "minutes": 0}
    beside = [settings(3068, 500, d, data="photos", files=True, cores=16) for d in ("cpu", "cuda")]
    assert [each.threads for each in beside] == [16, GPU_THREADS]
    assert photo_defaults(epochs=3) == tuned | {"epochs": 3, "minutes": 0}
    assert photo_defaults(probed=False) == tuned | {"probe": False}
    of_sgd = {"optimizer": "sgd", "lr": 0.1 * 32 / 256, "head_lr": 1}
    assert photo_defaults(optimizer="sgd") == tuned | of_sgd
    assert photo_defaults(model="tf_efficientnet_lite0", pretrained=True) == tuned
    whole = {"model": "resnet18", "image_size": 224, "blocks": "all", "layer_decay": 0.7}
    resnet = {"model": "resnet18", "pretrained": True}
    assert photo_defaults(**resnet) == tuned | whole
    assert photo_defaults(**resnet, layers=0) == tuned | whole | {"layer_decay": 1}
    assert photo_defaults(**resnet, optimizer="sgd") == tuned | whole | of_sgd | {"layer_decay": 1}
    scratch = {
        "model": "resnet18",
        "pretrained": False,
        "objective": "cone",
        "image_size": 224,
        "epochs": 100,
        "minutes": 0,
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.1 * 64 / 256,
        "head_lr": 1,
        "layer_decay": 1,
        "blocks": "all",
        "probe": False,
    }
    assert photo_defaults(from_scratch=True) == scratch
    assert photo_defaults(model="resnet18") == scratch
    assert settings(3068, 64, data="photos", files=True).pretrained is False
    assert settings(3068, 65, data="photos", files=True).pretrained is True


def test_the_trained_photo_model_is_evaluated_at_a_larger_size_by_any_name():
    named = {"model": "tf_efficientnet_lite0"}
    for given in ({}, named | {"pretrained": True}, named | {"weights": "run"}):
        found = settings(3068, 500, data="photos", files=True, **given)
        assert (found.image_size, found.eval_size) == (160, 192)
    found = settings(3068, 500, data="photos", files=True, **named)
    assert (found.image_size, found.eval_size) == (224, 224)  # from scratch


def test_the_rate_from_pretrained_weights_grows_with_the_root_of_the_batch():
    for batch, factor in ((8, 0.5), (32, 1.0), (128, 2.0)):
        found = settings(5000, 64, pretrained=True, batch_size=batch).lr
        assert found == pytest.approx(factor * defaults.TUNED_LR)
        vit = {"model": "vit_tiny_patch16_224", "pretrained": True, "batch_size": batch}
        assert settings(5000, 64, **vit).lr == pytest.approx(factor * defaults.TUNED_LR / 3)


@pytest.mark.parametrize(("images", "epochs"), [(100, 60), (8_333, 60), (20_000, 25), (90_000, 10)])
def test_epochs_from_pretrained_weights(images, epochs):
    assert settings(images, 500, data="photos", files=True).epochs == epochs


def test_what_was_asked_for_stays():
    config = settings(1294, 8, batch_size=48, lr=0.3, epochs=3, model="resnet18", threads=2)
    assert (config.batch_size, config.lr, config.epochs) == (48, 0.3, 3)
    assert (config.model, config.threads) == ("resnet18", 2)
    plain = {name: value for name, value in config.flat().items() if name != "check"}
    assert "auto" not in [*plain.values()]


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        ({"batch_size": 64}, 1, "larger than the 50 training images"),
        ({"batch_size": 30}, 4, "use 28, 32"),
        ({"batch_size": 32, "accumulate": 3}, 1, "use 30, 33"),
        ({"batch_size": 24, "mixup": 0.2}, 2, "multiple of 8"),
    ],
)
def test_numbers_that_do_not_fit(options, world, words):
    config = data_settings(images=50, **({"mixup": 0, "cutmix": 0} | options))
    with pytest.raises(ConfigError, match=words):
        check(config, images=50, world_size=world)


def test_meters_average_an_interval_and_survive_a_checkpoint():
    first, second = Meters(torch.device("cpu")), Meters(torch.device("cpu"))

    def loss(value, ce, lonely):
        terms, counts = {"ce": torch.tensor(ce)}, {"without_positive": torch.tensor(lonely)}
        return Loss(torch.tensor(value), terms, counts)

    for value in (1.0, 2.0):
        first.add(loss(value, 10 * value, 3))
    sums, state = first.state()
    second.load({n: t.clone() for n, t in sums.items()}, json.loads(json.dumps(state)))
    for meters in (first, second):
        meters.add(loss(6.0, 0.0, 1))
        assert meters.take() == {"loss": 3.0, "ce": 10.0}
        assert meters.take() == {}
        meters.add(loss(7.0, 2.0, 0))
        assert meters.take_epoch() == ({"loss": 4.0, "ce": 8.0}, {"without_positive": 7})
        assert meters.take_epoch() == ({}, {})
        assert meters.state()[0]["epoch"].numel() == 0
        assert meters.take() == {"loss": 7.0, "ce": 2.0}


def test_threads_are_the_cores_that_slurm_gives_the_process(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    before = torch.get_num_threads()
    try:
        assert resolved({"model": "resnet18", "image_size": 64, "objective": "ce"}).threads == 3
    finally:
        torch.set_num_threads(before)


def test_batches_are_balanced_where_pretrained_contrast_needs_other_images_of_the_class():
    photos = {"side": 500, "files": True, "positives": True}
    assert settings(**photos).sampler == "balanced"
    assert settings(**photos | {"positives": False}).sampler == "shuffle"
    assert settings(**photos, from_scratch=True).sampler == "shuffle"
    assert settings(**photos, per_class=8).sampler == "balanced"
    with pytest.raises(ConfigError, match="no multiple of --per-class 5"):
        settings(**photos, per_class=5)
    assert settings(**photos, repeats=2).sampler == "shuffle"
    assert settings(**photos, sampler="weighted").sampler == "weighted"


@pytest.mark.parametrize(
    ("pretrained", "images", "views"), [(True, 20, 1), (True, 19, 2), (False, 1000, 2)]
)
@pytest.mark.parametrize("kind", [SupCon, SCHaNe])
def test_one_crop_an_image_where_its_class_has_others(kind, pretrained, images, views):
    facts = {"dim": 8, "classes": 10, "images": images, "pretrained": pretrained}
    objective = kind(**facts)
    assert objective.config.views == objective.stages()[0].views == views
    assert kind(kind.Config(views=3), **facts).config.views == 3


@pytest.mark.parametrize(("pretrained", "mix"), [(True, 0.5), (False, 0.9)])
def test_schane_from_scratch_is_mixed_as_published(pretrained, mix):
    facts = {"dim": 8, "classes": 10, "pretrained": pretrained}
    assert SCHaNe(**facts).config.mix == mix
    assert SCHaNe(SCHaNe.Config(mix=0.2), **facts).config.mix == 0.2
