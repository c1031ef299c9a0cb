"""`--minutes`: the arithmetic of the plan, with measurements that the test gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
from tests.training.settings_cases import settings
from torch import nn

from nearkin.config import RunConfig
from nearkin.training import plan as plans
from nearkin.training.loop import validation_interval
from nearkin.training.plan import RESERVE, plan

EVALUATED = 0.01  # seconds an image


class Alone:
    """In place of the runtime, one process."""

    def share(self, value):
        return value


@pytest.fixture(scope="module")
def backbone():
    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


@pytest.fixture
def planned(monkeypatch, backbone):
    """A plan where an epoch of training takes `seconds[blocks]`; 500 training, 100 validation and 200 test images."""

    def make(
        seconds,
        *,
        minutes=10.0,
        spent=60.0,
        stages=1,
        probe=True,
        writes="logits",
        head=True,
        **given,
    ):
        tried = []

        def epoch(settings, *_):
            tried.append(settings.blocks)
            return seconds if isinstance(seconds, float) else seconds[settings.blocks]

        monkeypatch.setattr(plans, "_epoch", epoch)
        monkeypatch.setattr(plans, "_evaluation", lambda *_: lambda images: EVALUATED * images)
        monkeypatch.setattr(plans.time, "monotonic", lambda: 0.0)
        splits = {
            name: SimpleNamespace(labels=np.zeros(count))
            for name, count in (("train", 500), ("val", 100), ("test", 200))
        }
        classifier = nn.Linear(2, 2) if head else nn.Identity()
        stage = SimpleNamespace(share=1 / stages, heads=("classifier",))
        objective = SimpleNamespace(
            stages=lambda: [stage] * stages, heads={"classifier": SimpleNamespace(writes=writes)}
        )
        network = SimpleNamespace(backbone=backbone, heads={"classifier": classifier})
        built = SimpleNamespace(objective=objective, network=network)
        photos = {"data": "photos", "side": 500, "files": True}
        photos |= {"minutes": minutes, "probe": probe}
        start = settings(**photos, **given)
        made = plan(
            start,
            built,
            SimpleNamespace(splits=splits),
            None,
            Alone(),
            config=RunConfig(**given),
            spent=spent,
        )
        return made, tried

    return make


def test_the_epochs_fit_into_what_is_left(planned):
    made, tried = planned(14.0)
    # The probe's validation, the result, and the kin of training with their temperature.
    after = (100 + 200 + 500 + 100) * EVALUATED
    left = 600 * (1 - RESERVE) - 60 - after
    epochs = int(left / (14.0 + 100 * EVALUATED))
    assert (made.settings.epochs, made.settings.minutes) == (epochs, 0.0)
    assert tried == [4]
    assert 60 + epochs * 15.0 + after <= 600
    assert made.settings.warmup_epochs == pytest.approx(0.05 * epochs)
    assert (
        str(made)
        == f"plan: {epochs} epochs in about {epochs * 15 / 60:.1f} of {left / 60:.1f} min that are left"
    )


def test_validation_without_a_classifier_embeds_training_images_too(planned):
    made, _ = planned(14.0, writes="projection")
    after = (100 + 200 + 500 + 100) * EVALUATED
    left = 600 * (1 - RESERVE) - 60 - after
    assert made.settings.epochs == int(left / (14.0 + (100 + 500) * EVALUATED))


def test_there_are_never_more_epochs_than_usual(planned):
    assert planned(0.5)[0].settings.epochs == 60
    assert planned(0.5, epochs=7)[0].settings.epochs == 7


def test_fewer_blocks_learn_where_few_epochs_fit(planned):
    made, tried = planned({4: 99.0, 2: 40.0, 1: 30.0, 0: 20.0})
    assert tried == [4, 2]
    assert (made.settings.blocks, made.settings.epochs) == (2, 12)


def test_blocks_that_were_asked_for_stay(planned):
    made, tried = planned({4: 99.0, 2: 40.0}, blocks=4)
    assert tried == [4]
    assert (made.settings.blocks, made.settings.epochs) == (4, 4)
    made, tried = planned(100.0, blocks="all", warmup_epochs=2.0)
    assert (tried, made.settings.warmup_epochs) == (["all"], 2.0)


def test_what_never_fits_ends_with_the_probe_and_says_so(planned):
    made, tried = planned(6000.0)
    assert tried == [4, 2, 1, 0]
    assert made.settings.epochs == 0
    assert "an epoch takes about 100.0 min, and 8.2 min are left; give more --minutes" in str(made)


def test_random_blocks_are_never_frozen(planned):
    made, tried = planned({"all": 99.0}, from_scratch=True, probe=False)
    assert (tried, made.settings.epochs) == (["all"], 4)


def test_where_nothing_fits_the_fewest_blocks_learn(planned):
    made, tried = planned({4: 6000.0, 2: 3000.0, 1: 2000.0, 0: 1000.0}, probe=False)
    assert tried == [4, 2, 1, 0]
    assert (made.settings.blocks, made.settings.epochs) == (0, 1)


def test_time_that_is_gone_is_not_measured_any_longer(planned):
    made, tried = planned(9.0, spent=700.0)
    assert tried == [4]
    assert "0.0 min are left" in str(made)


def test_a_new_fit_takes_a_part_of_the_time(planned):
    without, _ = planned(14.0)
    with_fit, _ = planned(14.0, refit=True)
    # 2 validations, and features of 600 images of two views, twice.
    assert without.left - with_fit.left == pytest.approx((200 + 4 * 600) * EVALUATED)


@pytest.mark.parametrize(
    ("each", "minutes", "images"),
    [
        (0.001, 15.0, 20_000),  # 40 s of 300
        (0.010, 15.0, 10_000),  # 400 s, so half as many
        (0.040, 15.0, 2_500),
        (9.000, 15.0, 625),  # never fewer than these
        (9.000, 0.0, 20_000),
    ],
)
def test_the_probe_takes_a_third_of_the_time(monkeypatch, each, minutes, images):
    monkeypatch.setattr(plans, "_evaluation", lambda *_: lambda count: each * count)
    given = settings(data="photos", side=500, files=True, minutes=minutes)
    assert given.probe_images == 20_000
    dataset = SimpleNamespace(splits={"train": SimpleNamespace(labels=np.zeros(50_000))})
    assert plans.probe_images(given, None, dataset, None, Alone()) == images


def test_without_a_probe_every_stage_gets_an_epoch(planned):
    assert planned(6000.0, probe=False, stages=2)[0].settings.epochs == 2
    assert planned(300.0, probe=True, stages=2)[0].settings.epochs == 0


def test_validations_are_rarer_where_they_would_take_the_time():
    """Ten validation images for each training image: every tenth epoch, but twenty times in a run."""

    def interval(train, val, epochs):
        counts = {"train": train} | ({"val": val} if val else {})
        splits = {name: SimpleNamespace(labels=np.zeros(n)) for name, n in counts.items()}
        return validation_interval(SimpleNamespace(splits=splits), epochs)

    assert [interval(50, 500, epochs) for epochs in (400, 200, 100, 19)] == [10, 10, 5, 1]
    assert interval(500, 500, 400) == interval(500, 499, 400) == 1
    assert interval(500, 0, 400) == 1


def test_a_plan_counts_rare_validations():
    """An epoch and a validation take a second each; 500 validation images and 50 to train on."""
    splits = {
        name: SimpleNamespace(labels=np.zeros(n)) for name, n in (("train", 50), ("val", 500))
    }
    dataset = SimpleNamespace(splits=splits)

    def seconds(epochs):
        return epochs * (1 + 1 / max(1, min(10, epochs // 20)))

    for left in (0.5, 30.0, 65.0, 400.0):
        expected = max(epochs for epochs in range(401) if seconds(epochs) <= left)
        assert plans._fitting(1.0, 1.0, left, 400, dataset) == expected
