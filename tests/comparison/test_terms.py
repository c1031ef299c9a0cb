"""Equal terms: what the runs of a comparison share at the same seed."""

from __future__ import annotations

import pytest
import torch
from tests.pictures import write_classes, write_image

from nearkin.comparison.entries import parse
from nearkin.comparison.plan import jobs, terms, unequal
from nearkin.config import RunConfig
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError
from nearkin.training.batches import train_batches
from nearkin.training.prepare import prepare


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data") / "photos", each=40)


@pytest.fixture
def told():
    """Notes of the plans of a test."""
    return []


@pytest.fixture
def planned(photos, told):
    def make(words, *, budget="crops", **options):
        given = {"data": str(photos), "epochs": 8, "batch_size": 8, "split_seed": 0} | options
        entries = parse(words.split(","))
        with Runtime(device="cpu", precision="fp32") as runtime:
            found, notes = terms(
                entries, given, budget=budget, seeds=[0], runtime=runtime, quiet=True
            )
        told.extend(notes)
        return found, given

    return make


def prepared(config):
    with Runtime(device="cpu", precision="fp32") as runtime:
        return prepare(config, runtime, look=False)


def test_runs_of_a_seed_share_split_weights_order_and_pixels(planned):
    found, given = planned("ce,supcon,cone,attract-repulse", flip=True, seed=0)
    runs = jobs(found, given, [5, 6])
    by_seed = {seed: [prepared(job.config) for job in runs if job.seed == seed] for seed in (5, 6)}
    for first, *others in by_seed.values():
        settings = first.settings
        for other in others:
            for name in ("train", "val"):
                ours, theirs = first.dataset.splits[name], other.dataset.splits[name]
                names = [
                    [split.images.name(row) for row in range(len(split.labels))]
                    for split in (ours, theirs)
                ]
                assert names[0] == names[1]
            weights, same = (each.built.network.backbone.state_dict() for each in (first, other))
            assert all(torch.equal(value, same[name]) for name, value in weights.items())
            assert other.settings.batch_size == settings.batch_size
            for (images, labels, index), (more, own, rows) in zip(
                batches(first), batches(other), strict=True
            ):
                assert torch.equal(index, rows)
                assert torch.equal(labels, own)
                assert torch.equal(images[0], more[0])
    first, second = (prepared(job.config) for job in (runs[0], runs[4]))
    assert first.dataset.fingerprint == second.dataset.fingerprint  # one split for all seeds
    assert not torch.equal(next(iter(batches(first))).index, next(iter(batches(second))).index)


def batches(prepared):
    """The first three batches of the first stage."""
    stage = prepared.built.objective.stages()[0]
    split = prepared.dataset.splits["train"]
    with Runtime(device="cpu", precision="fp32") as runtime:
        yield from train_batches(
            prepared.settings, split, runtime, views=stage.views, first=0, last=3
        )


def test_crops_through_the_student_are_equal(planned):
    found, _ = planned("ce,supcon,cone,cone:teacher_crop=own,attract-repulse", epochs=16)
    counted = {each.entry.name: each.crops(each.epochs) for each in found}
    epochs = {each.entry.name: each.epochs for each in found}
    assert epochs["ce"] == epochs["cone"] == epochs["cone:teacher_crop=own"] == 16
    assert epochs["supcon"] == 8  # two views of each image
    one_epoch = found[0].crops(1)
    assert all(abs(crops - counted["ce"]) <= one_epoch for crops in counted.values())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images that are read by the packaged network."""
    root = tmp_path_factory.mktemp("large")
    for label, name in enumerate(("cat", "dog")):
        for number in range(40):
            write_image(root / name / f"{number}.png", label, number, size=(70, 66))
    return {"data": str(root), "batch_size": "auto"}


def test_an_entry_with_a_batch_of_its_own_gets_as_many_crops(planned, large):
    """That of a training from scratch, beside trained weights."""
    (base, other), _ = planned("ce,ce:from_scratch=true", epochs=16, **large)
    assert [each.options["batch_size"] for each in (base, other)] == [32, 16]
    assert [each.steps_per_epoch for each in (base, other)] == [2, 4]  # 72 training images
    assert base.crops(base.epochs) == other.crops(other.epochs) == 16 * 2 * 32


def test_repeated_images_do_not_meet_balanced_batches(planned, large):
    words = "ce,ce:repeats=2,supcon:sampler=balanced"
    assert len(planned(words)[0]) == 3  # what an entry names itself is its own
    with pytest.raises(ConfigError, match=r"^ce:repeats=2: --repeats needs --sampler shuffle"):
        planned("ce,ce:repeats=2,supcon", **large)


def test_minutes_are_given_to_all_as_they_are(planned):
    found, given = planned("ce,supcon", budget="minutes", epochs="auto", minutes=3.0)
    assert [each.epochs for each in found] == [None, None]
    made = jobs(found, given, [0])
    assert {job.config.minutes for job in made} == {3.0}
    assert {job.config.epochs for job in made} == {100_000}  # the minutes end each run


def test_terms_of_equal_minutes_are_not_measured(planned):
    options = {"budget": "minutes", "epochs": "auto", "minutes": 3.0}
    first, again = (planned("ce,supcon", **options)[0] for _ in range(2))
    assert [each.options for each in first] == [each.options for each in again]
    assert {each.options["probe_images"] for each in first} == {20_000}


def test_an_averaged_copy_needs_a_number_of_steps(planned):
    options = {"budget": "minutes", "epochs": "auto", "minutes": 3.0}
    with pytest.raises(ConfigError, match=r"^ce\+ema remembers a twentieth of the steps"):
        planned("ce,ce+ema", **options)
    found = planned("ce,ce:ema=0.9", **options)[0]
    assert float(found[1].options["ema"]) == 0.9


def test_few_epochs_that_cannot_be_equal_are_told(planned):
    (note,) = unequal(planned("ce,supcon", epochs=3)[0])
    assert note.startswith("supcon gets 33 % fewer crops than ce")
    (note,) = unequal(planned("ce,supcon", epochs=1)[0])
    assert "100 % more crops" in note
    assert unequal(planned("ce,supcon", epochs=16)[0]) == []


def test_crops_up_to_a_step_follow_the_stages(planned):
    found = planned("ce,supcon:mode=two-stage", epochs=16)[0][1]
    steps, batch = found.steps_per_epoch, 8
    first = round(found.stages[0].share * 10) * steps
    assert found.crops(10, first) == first * batch * 2
    assert found.crops(10, first + 3) == first * batch * 2 + 3 * batch
    assert found.crops(10, 10 * steps) == found.crops(10)


def test_a_rival_with_another_augmentation_is_no_cross_entropy(planned):
    found, given = planned("ce,ce:augment=none,ce:mixup=0.2,ce:repeats=2,supcon")
    names = [each.entry.name for each in found]
    assert names == ["ce", "ce:augment=none", "ce:mixup=0.2", "ce:repeats=2", "supcon"]
    assert [job.config.mixup for job in jobs(found, given, [0])][2] == 0.2


@pytest.mark.parametrize(
    ("option", "follows"),
    [
        ("augment=strong", ("randaugment", "jitter", "erasing", "mixup", "cutmix")),
        ("augment=none", ("crop_scale", "flip")),
        ("image_size=24", ("eval_size",)),
        ("model=resnet18", ("model_options",)),
    ],
)
def test_what_follows_from_an_option_of_an_entry_is_its_own_as_well(planned, option, follows):
    """As in a training of its own, with the terms of all for the rest."""
    name, value = option.split("=")
    found, given = planned(f"ce,ce:{option},supcon:{option}")
    options = {name: int(value) if value.isdigit() else value}
    alone = prepared(RunConfig(**given, **options, objective="ce", minutes=0.0)).settings
    base, *others = (prepared(job.config).settings for job in jobs(found, given, [0]))
    for settings in others:
        assert getattr(settings, name) == getattr(alone, name) != getattr(base, name)
        for each in follows:
            assert getattr(settings, each) == getattr(alone, each), each
    assert any(getattr(alone, each) != getattr(base, each) for each in follows)


def test_an_averaged_copy_of_a_long_run_is_possible(planned):
    (_, averaged), _ = planned("ce,ce+ema", epochs=60_000)
    assert 0.9999 < averaged.options["ema"] < 1


def test_an_option_that_an_entry_names_is_its_alone(planned):
    found, given = planned("ce,supcon:sampler=balanced", sampler="auto")
    samplers = {
        job.entry.name: prepared(job.config).settings.sampler for job in jobs(found, given, [0])
    }
    assert samplers["ce"] == "shuffle"
    assert samplers["supcon:sampler=balanced"] == "balanced"


def test_rivals_differ_from_cross_entropy_in_one_thing(planned):
    found, given = planned("ce,ce+ls,ce+ema")
    settings = [prepared(job.config).settings.flat() for job in jobs(found, given, [0])]
    base, smooth, averaged = settings
    assert changed(base, smooth) == {"objective.smoothing": (0.0, 0.1)}
    assert set(changed(base, averaged)) == {"ema"}
    assert 0.5 <= averaged["ema"] < 1


def changed(one, other):
    return {name: (one[name], other[name]) for name in one if one[name] != other.get(name)}


def test_a_rival_that_is_cross_entropy_is_left_out(planned, told):
    found, _ = planned("ce:smoothing=0.1,ce,ce+ls,ce+ema")
    assert [each.entry.name for each in found][:2] == ["ce", "ce:smoothing=0.1"]
    assert told == []
    found, _ = planned("ce,ce:smoothing=0,supcon")
    assert [each.entry.name for each in found] == ["ce", "supcon"]
    assert told == ["ce:smoothing=0 is ce here, and is left out"]
    with pytest.raises(ConfigError, match="nothing to compare"):
        planned("ce,ce:smoothing=0")


def test_an_order_of_its_own_tells_an_entry_from_cross_entropy(planned, told, large):
    """With `supcon` all batches are balanced, those of `ce` too."""
    found, given = planned("ce,ce:sampler=shuffle,ce:sampler=balanced,supcon", **large)
    samplers = {
        job.entry.name: prepared(job.config).settings.sampler for job in jobs(found, given, [0])
    }
    assert samplers == {"ce": "balanced", "ce:sampler=shuffle": "shuffle", "supcon": "balanced"}
    assert told == ["ce:sampler=balanced is ce here, and is left out"]


def test_weights_at_inference_count_the_heads_that_logits_need(planned):
    found, _ = planned("ce,supcon,cone,ce:classifier=embedding,cone:classifier=embedding")
    plain, *beside, deeper, published = (each.weights for each in found)
    assert beside == [plain, plain]  # the projections are not needed
    assert published == deeper > plain


def test_runs_start_seed_after_seed(planned):
    found, given = planned("ce,supcon")
    order = [(job.seed, job.entry.name) for job in jobs(found, given, [3, 4])]
    assert order == [(3, "ce"), (3, "supcon"), (4, "ce"), (4, "supcon")]


def test_an_error_in_the_options_of_an_entry_names_it(planned):
    with pytest.raises(ConfigError, match=r"^supcon:weight=-1: .*weight"):
        planned("ce,supcon:weight=-1")
    with pytest.raises(ConfigError, match=r"^supcon:lr=many: .*lr"):
        planned("ce,supcon:lr=many")
