"""Runs that start from weights: what is loaded, what rests, at which rate; and models with options of their own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pictures import write_classes
from tests.training.settings_cases import settings

from nearkin.cli import run as command
from nearkin.config import RunConfig, read_yaml, validate
from nearkin.data.transforms import TrainSpec
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, ModelError
from nearkin.evaluation.model import load_bundle
from nearkin.network import load_weights
from nearkin.training import checks, defaults
from nearkin.training.api import continue_run, start_run
from nearkin.training.loop import legs
from nearkin.training.plan import _candidates
from nearkin.training.prepare import prepare
from nearkin.training.trainer import Trainer
from nearkin.types import Progress

TINY = {"data": "digits", "images_per_class": 10, "batch_size": 32, "threads": 1, "epochs": 2}


def config_of(**values):
    return validate(RunConfig, TINY | {"model": "test_resnet", "objective": "ce"} | values)


def job_of(quiet=True, **values):
    return prepare(config_of(**values), Runtime(device="cpu", precision="fp32"), quiet=quiet)


def run_of(out, **values):
    return start_run(TINY | {"objective": "ce", "epochs": 1, "out": out} | values, quiet=True)


def test_layer_decay_is_for_what_starts_from_weights_with_adamw(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "TUNED_DECAY", 0.75)
    assert settings(pretrained=True).layer_decay == 0.75
    assert settings(weights=tmp_path).layer_decay == 0.75
    assert settings().layer_decay == 1.0
    assert settings(model="vit_tiny_patch16_224").layer_decay == 1.0
    assert settings(pretrained=True, optimizer="sgd").layer_decay == 1.0
    assert settings(pretrained=True, layers=0).layer_decay == 1.0
    assert settings(optimizer="sgd", layer_decay=0.5).layer_decay == 0.5


@pytest.mark.parametrize("layers", [14, 49, 100])
def test_the_lowest_of_many_layers_learns_as_that_of_a_transformer_of_12_blocks(layers):
    decay = settings(pretrained=True, layers=layers).layer_decay
    assert decay**layers == pytest.approx(0.75**13)


def test_a_classifier_for_as_many_other_classes_starts_afresh(tmp_path, capsys):
    """Its rows would be those of the other classes."""
    for root, names in (("old", "abc"), ("new", "xyz")):
        write_classes(tmp_path / root, tuple(names), each=6)
    own = {"model": "test_resnet", "image_size": 16, "batch_size": 8, "workers": 0, "epochs": 0}
    run = run_of(tmp_path / "run", data=str(tmp_path / "old"), seed=1, **own).run
    capsys.readouterr()
    for root, fresh in (("old", False), ("new", True)):
        config = config_of(data=str(tmp_path / root), weights=run, probe=False, **own)
        made = prepare(config, Runtime(device="cpu", precision="fp32"), quiet=False).built.network
        said = "2 left as initialised, since for other classes (heads.classifier."
        assert (said in capsys.readouterr().err) == fresh
        stored = load_file(run / "model.safetensors")["heads.classifier.weight"]
        assert torch.equal(made.heads["classifier"].weight, stored) != fresh


@pytest.mark.parametrize(
    ("side", "given", "expected"),
    [
        (32, {}, (32, 1.0)),
        (64, {}, (64, 1.0)),
        (96, {}, (96, 0.875)),
        (300, {"image_size": 160, "eval_size": 224, "eval_crop": 0.95}, (224, 0.95)),
        (300, {"image_size": 32, "eval_size": 96}, (96, 0.875)),
        (300, {"files": True}, (192, 0.875)),  # photos for the packaged network
        (
            300,
            {"files": True, "model": "resnet18", "pretrained": True, "image_size": 160},
            (160, 0.875),
        ),
    ],
)
def test_the_size_in_evaluation(side, given, expected):
    config = settings(side=side, **given)
    assert (config.eval_size, config.eval_crop) == expected


def test_batchnorm_of_a_backbone_with_new_layers_learns(tmp_path):
    """Weights of another network, of which some fit."""
    from nearkin.network.weights import LoadReport

    whole = LoadReport(
        tmp_path, ("backbone.conv1.weight",), ("heads.classifier.weight",), (), {}, {}
    )
    assert whole.whole_backbone
    assert not whole._replace(missing=("backbone.bn1.weight",)).whole_backbone
    assert not whole._replace(mismatched={"backbone.conv1.weight": "3 and 4"}).whole_backbone


PARTS = ("crop_scale", "randaugment", "jitter", "jitter_prob", "grey_prob", "erasing", "flip")


@pytest.mark.parametrize(
    ("augment", "side", "expected"),
    [
        ("none", 96, ("centre", 0, 0.0, 1.0, 0.0, 0.0, False)),
        ("light", 64, ("padded", 0, 0.0, 1.0, 0.0, 0.0, True)),
        ("light", 65, (0.35, 0, 0.0, 1.0, 0.0, 0.0, True)),
        ("medium", 96, (0.35, 0, 0.4, 1.0, 0.1, 0.0, True)),
        ("strong", 96, (0.35, 9, 0.4, 1.0, 0.0, 0.25, True)),
    ],
)
def test_strengths_are_resolved_into_their_parts(augment, side, expected):
    config = settings(side=side, data="photos", augment=augment)
    assert tuple(getattr(config, part) for part in PARTS) == expected
    spec = TrainSpec.model_validate(config, from_attributes=True)
    assert tuple(getattr(spec, part) for part in PARTS) == expected
    assert (spec.image_size, spec.channels) == (side, 3)


def test_a_part_that_is_set_stays_whatever_the_strength():
    given = dict(zip(PARTS, (0.08, 7, 0.2, 0.8, 0.3, 0.5, True), strict=True))
    for augment in ("none", "light", "medium", "strong"):
        config = settings(augment=augment, **given)
        assert {part: getattr(config, part) for part in PARTS} == given
    assert settings(augment="strong", erasing=0).jitter == 0.4


def test_layers_without_names_are_told_before_training(monkeypatch):
    monkeypatch.delattr("timm.models.resnet.ResNet.group_matcher")
    with pytest.raises(ConfigError, match="test_resnet does not name its layers; leave out"):
        job_of(layer_decay=0.9)
    assert job_of(layer_decay=1.0).settings.layer_decay == 1.0


@pytest.mark.parametrize(
    "values", [{"objective": "ce"}, {"objective": "supcon", "objective.mode": "two-stage"}]
)
def test_a_frozen_backbone_rests_in_every_stage(tmp_path, capsys, values):
    """Neither its weights nor its BatchNorm statistics move; the active heads do."""
    job = job_of(quiet=False, freeze_backbone=True, **values)
    assert "note: --freeze-backbone keeps random weights" in capsys.readouterr().err
    trainer = Trainer(job, Runtime(device="cpu", precision="fp32"), tmp_path, quiet=True)
    network = trainer.stepper.network
    for leg in legs(trainer.stages, 2, trainer.steps_per_epoch):
        trainer.stepper.begin(leg.stage)
        before = {n: t.clone() for n, t in network.state_dict().items()}
        for batch in trainer._loader(leg.stage, leg.first, leg.first + 1):
            trainer.stepper.step(batch, Progress(leg.stage.name, 1, 4, 0, 1), leg.first)
        after = network.state_dict()
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed
        assert {n.split(".")[0] for n in changed} == {"heads"}
        assert {n.split(".")[1] for n in changed} == set(leg.stage.heads)


@pytest.mark.parametrize("option", ["--blocks 1", "--epochs 0"])
def test_random_weights_that_are_kept_are_told(option, capsys):
    name, value = option.removeprefix("--").split()
    job_of(quiet=False, objective="ce", **{name: int(value)})
    assert f"note: {option} keeps random weights" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "parts", "at_once"), [(256, 4, 64), (256, 1, 256), (16, 1, 64)])
def test_evaluation_takes_as_many_images_at_once_as_training(batch, parts, at_once):
    given = settings(batch_size=batch).model_copy(update={"accumulate": parts})
    assert checks.evaluated_at_once(given, ranks=1) == at_once
    assert checks.evaluated_at_once(given, ranks=4) == 64


def test_a_run_that_has_not_ended_gives_no_weights(tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    with pytest.raises(ModelError, match="begun has no model.safetensors; a run that has not end"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "begun")


def test_a_run_of_another_objective_and_other_classes_gives_its_backbone(tmp_path, capsys):
    """As a folder or a file, with the stem it was trained with; what is left as it was is named."""
    first = tmp_path / "first"
    run_of(first, model="test_resnet", objective="supcon")
    weights = load_file(first / "model.safetensors")
    assert json.loads((first / "model.json").read_text())["spec"]["stem"] == "small"
    weights["heads.classifier.weight"] = torch.zeros(7, 96)  # another number of classes
    weights["heads.classifier.bias"] = torch.zeros(7)
    save_file(weights, first / "model.safetensors")
    for given in (first, first / "model.safetensors"):
        job = job_of(quiet=False, weights=given, freeze_backbone=True)
        said = capsys.readouterr().err
        assert "keeps random weights" not in said
        assert "of another shape" in said
        assert "heads.classifier.weight (7x96 in the file, 10x96 here)" in said
        assert "not used (heads.projection" in said
        assert job.built.spec.stem == "small"
        state = job.built.network.state_dict()
        backbone = [name for name in weights if name.startswith("backbone.")]
        assert backbone
        assert all(torch.equal(state[name], weights[name]) for name in backbone)
        assert bool(state["heads.classifier.weight"].abs().sum() > 0)


def test_the_names_of_beit3s_authors_are_told_from_timms(tmp_path):
    file = tmp_path / "beit3.pth"
    theirs = {
        "beit3.encoder.layers.0.self_attn.k_proj.A.weight": torch.zeros(4, 4),
        "beit3.vision_embed.cls_token": torch.zeros(1, 1, 4),
    }
    torch.save({"model": theirs}, file)
    with pytest.raises(ModelError) as caught:
        job_of(model="test_vit", image_size=32, weights=file)
    text = str(caught.value)
    assert "\n" not in text
    assert "beit3.encoder.layers.0" in text
    assert "backbone.cls_token" in text
    assert "under timm's names" in text


def test_a_transformer_that_takes_one_size_fails_before_training(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="48 x 48 pixels.*another --eval-size"):
        run_of(out, model="vit_tiny_patch16_224", image_size=32, eval_size=48, **{"model.depth": 1})
    assert not out.exists()


def test_a_run_that_is_tested_at_another_size(tmp_path):
    out = tmp_path / "run"
    result = run_of(out, model="test_resnet", image_size=16, eval_size=24, eval_crop=0.5)
    transform = json.loads((out / "model.json").read_text())["transform"]
    assert (transform["image_size"], transform["resize"]) == (24, 48)
    from nearkin import evaluate

    again = evaluate(out, "digits")
    assert again.top1 == pytest.approx(result.metrics["top1"])
    assert again.log_loss == pytest.approx(result.metrics["log_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """A finished run of a model with options, started from the command line."""
    out = tmp_path_factory.mktemp("runs") / "thin"
    words = ["train", "digits", "--objective", "ce", "--model", "test_vit", "--epochs", "1"]
    words += ["--model.depth", "2", "--model.embed-dim=32", "--model.num-heads", "2"]
    words += ["--image-size", "32", "--images-per-class", "10", "--batch-size", "32", "--quiet"]
    assert command([*words, "--threads", "1", "--layer-decay", "0.65", "--out", str(out)]) == 0
    return out


def test_options_of_the_model_travel_with_the_run(thin):
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    stored = read_yaml(thin / "config.yaml")
    assert {f"model.{k}": v for k, v in options.items()}.items() <= stored.items()
    spec = json.loads((thin / "model.json").read_text())["spec"]
    assert spec["model_options"] == options
    bundle = load_bundle(thin, torch.device("cpu"))
    assert (len(bundle.network.backbone.blocks), bundle.network.dim) == (2, 32)


def test_a_continued_run_keeps_them(thin):
    assert continue_run(thin, {"model.depth": "2"}, quiet=True).run == thin
    with pytest.raises(ModelError, match=r"cannot change model\.depth \(2 -> 3\)"):
        continue_run(thin, {"model.depth": 3}, quiet=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"checkpoint_path": "x.pth"}, "checkpoint_path cannot be set"),
        ({"pretrained": True}, "pretrained cannot be set"),
        ({"depth": "os.system"}, "model.depth"),
        ({"depth": 10**9}, "model.depth"),
        ({"unknown": 1}, "takes no option unknown"),
        ({"depth": 3}, "does not fit"),
    ],
)
def test_a_hostile_description_is_refused(thin, tmp_path, options, says):
    described = json.loads((thin / "model.json").read_text())
    described["spec"]["model_options"] |= options
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes((thin / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as caught:
        load_bundle(tmp_path, torch.device("cpu"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_description_of_before_has_no_options(thin, tmp_path):
    described = json.loads((thin / "model.json").read_text())
    del described["spec"]["model_options"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes((thin / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="does not fit"):  # read, and built as it says
        load_bundle(tmp_path, torch.device("cpu"))


def test_an_option_that_the_model_does_not_take_ends_before_the_folder(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "digits", "--objective", "ce", "--model", "test_resnet", "--out", str(out)]
    assert command([*words, "--model.depth", "2"]) == 2
    assert "test_resnet takes no option depth; leave out --model.depth" in capsys.readouterr().err
    assert not out.exists()


def test_auto_is_the_model_that_the_weights_come_from(tmp_path):
    run = run_of(tmp_path / "run", model="test_resnet").run
    config = validate(RunConfig, TINY | {"objective": "ce", "weights": run})
    prepared = prepare(config, Runtime(device="cpu", precision="fp32"))
    assert prepared.settings.model == "test_resnet"


def test_weights_of_which_some_are_missing_are_checked_like_options(tmp_path):
    """BatchNorm of such a backbone learns, and parts of a batch are not exact with it."""
    file = run_of(tmp_path / "run", model="test_resnet").run / "model.safetensors"
    weights = load_file(file)
    del weights[next(n for n in weights if n.startswith("backbone.") and n.endswith(".weight"))]
    save_file(weights, file)
    parts = {"weights": file, "objective": "supcon", "accumulate": 2}
    with pytest.raises(ConfigError, match="--accumulate 2 cannot be exact for supcon"):
        job_of(**parts)
    assert not job_of(**parts, batchnorm_by_parts=True).settings.freeze_batchnorm


TWO_STAGES = {"objective": "supcon", "objective.mode": "two-stage"}


@pytest.mark.parametrize("given", [{"freeze_backbone": True}, {"blocks": 0}])
def test_a_stage_in_which_nothing_can_learn_is_refused(tmp_path, given):
    """Features of trained weights are contrasted as they are, without a projection."""
    run = run_of(tmp_path / "run", model="test_resnet").run
    with pytest.raises(ConfigError, match="Nothing can learn in the stage contrast"):
        run_of(tmp_path / "other", weights=run, epochs=2, **TWO_STAGES | given)
    assert not (tmp_path / "other").exists()
    job_of(weights=run, **TWO_STAGES, freeze_backbone=True, **{"objective.attach": "projection"})


def test_a_plan_leaves_blocks_to_a_stage_whose_head_has_no_weights(tmp_path):
    run = run_of(tmp_path / "run", model="test_resnet").run
    for values, least in ((TWO_STAGES, 1), ({"objective": "ce"}, 0)):
        job = job_of(weights=run, **values)
        tried = _candidates(job.settings, job.built, choose=True)
        assert tried[0] == job.settings.blocks
        assert min(each for each in tried if each != "all") == least


def test_the_next_stage_goes_on_from_the_averaged_weights(tmp_path):
    """They were validated, so they are what the stage gives."""
    job = job_of(ema=0.9, **TWO_STAGES)
    trainer = Trainer(job, Runtime(device="cpu", precision="fp32"), tmp_path, quiet=True)
    begin, starts, averages = trainer.stepper.begin, [], []

    def begun(stage):
        if trainer.stepper.ema is not None:
            averages.append(_copied(trainer.stepper.ema.network))
        starts.append(_copied(trainer.stepper.network))
        begin(stage)

    trainer.stepper.begin = begun
    trainer.run()
    (average,) = averages
    assert all(torch.equal(value, average[name]) for name, value in starts[1].items())
    assert not all(torch.equal(value, average[name]) for name, value in starts[0].items())


def _copied(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_a_stage_that_gives_its_teacher_has_no_second_average(tmp_path):
    job = job_of(ema=0.9, objective="attract-repulse")
    trainer = Trainer(job, Runtime(device="cpu", precision="fp32"), tmp_path, quiet=True)
    averaged = []
    for stage in trainer.stages:
        trainer.stepper.begin(stage)
        averaged.append(trainer.stepper.ema is not None)
    assert averaged == [True, False]


def test_the_best_weights_so_far_may_be_those_of_the_probe(tmp_path):
    """The Mean Teacher starts from them where no epoch of the first stage was better."""
    run = run_of(tmp_path / "run", model="test_resnet", epochs=3).run
    job = job_of(weights=run, objective="attract-repulse", val_split=0.2)
    trainer = Trainer(job, Runtime(device="cpu", precision="fp32"), tmp_path, quiet=True)
    begin, starts = trainer.stepper.begin, []
    values = iter([0.9, 0.8, 0.7])  # of the probe and an epoch of each stage
    trainer._validate = lambda: {"metric": "top1", "value": next(values)}

    def begun(stage):
        starts.append((stage.name, _copied(trainer.stepper.network)))
        begin(stage)

    trainer.stepper.begin = begun
    trainer.run()
    (_, probe), (first, _), (second, given) = starts
    assert (first, second) == ("contrast", "mean-teacher")
    assert all(torch.equal(value, given[name]) for name, value in probe.items())


def test_the_best_weights_so_far_may_be_those_of_an_earlier_epoch(tmp_path):
    """Without a probe: of the two epochs of the first stage the first is better."""
    values = {"objective": "attract-repulse", "objective.contrast_share": 0.67}
    job = job_of(model="test_resnet", epochs=3, val_split=0.2, **values)
    trainer = Trainer(job, Runtime(device="cpu", precision="fp32"), tmp_path, quiet=True)
    begin, starts, validated = trainer.stepper.begin, [], []
    found = iter([0.9, 0.8, 0.7])

    def validate():
        validated.append(_copied(trainer.stepper.eval_network()))
        return {"metric": "top1", "value": next(found)}

    def begun(stage):
        starts.append((stage.name, _copied(trainer.stepper.network)))
        begin(stage)

    trainer._validate, trainer.stepper.begin = validate, begun
    trainer.run()
    (_, _), (name, given) = starts
    best, last, _ = validated
    assert name == "mean-teacher"
    assert all(torch.equal(value, given[name]) for name, value in best.items())
    assert not all(torch.equal(value, given[name]) for name, value in last.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"objective": "supcon", "objective.projection": 64, "objective.head_norm": "none"},
            "nothing reads --objective.projection, --objective.head-norm where the features are contrasted",
        ),
        ({"objective": "ce", "per_class": 8}, "nothing reads --per-class with --sampler shuffle"),
        (
            {"objective": "ce", "per_class": 8, "sampler": "weighted"},
            "nothing reads --per-class with --sampler weighted",
        ),
        (
            {"objective": "ce", "optimizer": "adamw", "momentum": 0.5},
            "nothing reads --momentum with --optimizer adamw",
        ),
        (
            {"objective": "ce", "optimizer": "lamb", "nesterov": False},
            "nothing reads --no-nesterov with --optimizer lamb",
        ),
        (
            {"objective": "attract-repulse", "objective.bank": 64},
            "nothing reads --objective.bank with --objective.negatives batch",
        ),
        (
            {"objective": "cone", "objective.teacher_momentum": 0.9},
            "nothing reads --objective.teacher-momentum with --objective.teacher-schedule constant",
        ),
        (
            {"objective": "supcon", "objective.contrast_share": 0.5},
            "nothing reads --objective.contrast-share with --objective.mode joint",
        ),
    ],
)
def test_options_without_effect_are_told(tmp_path, capsys, given, said):
    run = run_of(tmp_path / "run", model="test_resnet").run
    capsys.readouterr()
    job_of(quiet=False, weights=run, **given)
    assert f"note: {said}" in capsys.readouterr().err
    job_of(quiet=False, weights=run, objective="supcon")
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "told"),
    [("supcon", True), ("cone", True), ("schane", True), ("opl", True), ("ce", False)],
)
def test_a_contrast_of_frozen_features_is_told(tmp_path, capsys, objective, told):
    run = run_of(tmp_path / "run", model="test_resnet").run
    capsys.readouterr()
    job_of(quiet=False, weights=run, objective=objective, freeze_backbone=True)
    text = "nothing else learns from their contrast; --objective ce is the same"
    assert (text in capsys.readouterr().err) == told
    job_of(quiet=False, weights=run, objective=objective)
    assert text not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["supcon", "attract-repulse", "ce"])
def test_stored_settings_are_no_options_without_effect(tmp_path, capsys, name):
    """Every option is in them, whoever chose it."""
    run = run_of(tmp_path / "run", model="test_resnet").run
    stored = job_of(weights=run, objective=name).settings.flat()
    capsys.readouterr()
    prepare(validate(RunConfig, stored), Runtime(device="cpu", precision="fp32"), quiet=False)
    assert "nothing reads" not in capsys.readouterr().err
