"""Names that nearkin does not know are answered with the name that is meant, or with none."""

from __future__ import annotations

import re

import pytest

from nearkin import hints
from nearkin.catalogue import objectives
from nearkin.config import EpisodeOptions, RunConfig, validate
from nearkin.errors import ConfigError

TRAIN = (*RunConfig.model_fields, "resume", "config", "json", "quiet")
MEANT = """
    --learning-rate --lr        --lerning-rate --lr         --learning_rate --lr    --lr0 --lr
    --bs --batch-size           --batch --batch-size        --bach-size --batch-size
    --batch_size --batch-size   -b --batch-size             --per-device-train-batch-size --batch-size
    --arch --model              --model-name --model        --modle --model
    --wd --weight-decay         --weight-dekay --weight-decay
    --imgsz --image-size        --img-size --image-size     --input-size --image-size
    --num-epochs --epochs       --max_epochs --epochs       --epoch --epochs        --num-epoch --epochs
    --num-workers --workers     --nw --workers              --num_worker --workers
    --output --out              --output-dir --out          --project --out         --ouput-dir --out
    --opt --optimizer           --optim --optimizer         --optimzer --optimizer
    --amp --precision           --fp16 --precision          --gpu --device          --gpus --nproc-per-node
    --dropout --drop-rate       --drop-path-rate --drop-path
    --pretrain --pretrained     --loss --objective          --criterion --objective
    --warmup --warmup-epochs    --seeed --seed              --random-state --seed
    --gradient-clip-val --clip-grad --accumulate-grad-batches --accumulate
    --resume-from-checkpoint --resume --freeze-bn --freeze-batchnorm --max-time --minutes
""".split()
PAIRS = list(zip(MEANT[::2], MEANT[1::2], strict=True))


def named(text):
    """The options that a sentence names after the one that it complains about."""
    return re.findall(r"--[a-z-]+", text)[1 if re.search("option --", text) else 0 :]


@pytest.mark.parametrize(("given", "meant"), PAIRS, ids=[given for given, _ in PAIRS])
def test_the_option_that_is_meant(given, meant):
    text = str(hints.unknown_option(given, TRAIN))
    assert text.startswith(f"Unknown option {given}.")
    assert named(text) == [meant]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--patience", "does not stop early"),
        ("--num-classes", "takes the classes from DATA"),
        ("--label-smoothing", "--objective.smoothing"),
        ("--data-dir", "DATA"),
        ("--val-dir", "DATA/val"),
        ("--fp16", "--precision fp16."),
        ("--gpu", "--device cuda."),
        ("--log-wandb", "--log wandb."),
        ("--tensorboard", "--log tensorboard."),
        ("--report-to", "--log."),
        ("--nproc-per-node", "torchrun"),
        ("--lr-scheduler", "--warmup-epochs"),
        ("--max-steps", "--epochs"),
    ],
)
def test_what_has_no_option_of_its_own(given, words):
    assert words in str(hints.unknown_option(given, TRAIN))


@pytest.mark.parametrize(
    "given",
    [
        *("--foo", "--xyz", "--save", "--zoom", "--telemetry", "--verbatim", "--crop", "--betas"),
        *("--interpolation", "--batch-norm", "--num-views", "--train-ratio"),
        *("--test-size", "--fraction", "--val-interval", "--gp"),
    ],
)
def test_no_guess_is_better_than_a_wrong_one(given):
    assert str(hints.unknown_option(given, TRAIN)) == f"Unknown option {given}."
    assert str(hints.unknown_option(given, TRAIN, otherwise="See X.")).endswith(". See X.")


def test_a_hint_names_only_options_of_the_verb():
    assert named(str(hints.unknown_option("--batch", ("device", "tta")))) == []
    assert named(str(hints.unknown_option("--n-shot", EpisodeOptions.model_fields))) == ["--shots"]


def test_every_hint_names_an_option_that_exists():
    known = {name.replace("_", "-") for name in (*TRAIN, *EpisodeOptions.model_fields, "tta")}
    tables = hints.tables()
    assert {option.split()[0] for option in tables["options"]} <= known
    for option in re.findall(r"--([a-z-]+)[ .]", " ".join(tables["answers"])):
        assert option in known | {"objective", "nproc-per-node", "help"}


def test_every_name_has_one_meaning_and_the_plain_spelling():
    tables = hints.tables()
    words = " ".join([*tables["options"].values(), *tables["answers"].values()]).split()
    assert sorted(words) == sorted(set(words))
    assert all(word == hints.plain(word) for word in words)


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("optimizer", "adam", "adamw"),
        ("optimizer", "AdamW", "adamw"),
        ("optimizer", "adamww", "adamw"),
        ("optimizer", "adafactor", None),
        ("precision", "16-mixed", "fp16"),
        ("precision", "bfloat16", "bf16"),
        ("device", "gpu", "cuda"),
        ("sampler", "random", "shuffle"),
        ("augment", "srtong", "strong"),
        ("class_weights", "inverse", "balanced"),
    ],
)
def test_the_value_that_is_meant(option, value, meant):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, {option: value})
    found = re.findall(r"Did you mean (\S+)\?", str(caught.value))
    assert found == ([meant] if meant else [])


def test_values_and_options_in_python_get_the_same_hints():
    with pytest.raises(ConfigError, match="nearkin calls it --lr"):
        validate(RunConfig, {"learning_rate": 0.1})


def test_every_value_of_the_table_is_allowed():
    for option, values in hints.tables()["values"].items():
        allowed = set(objectives())
        if option != "objective":
            annotation = RunConfig.model_fields[option.replace("-", "_")].annotation
            allowed = set(re.findall("'([^']+)'", str(annotation)))
        assert set(values) <= allowed, option
