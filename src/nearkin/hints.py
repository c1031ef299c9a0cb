"""Hints for names that nearkin does not know: typing mistakes, and the names that other tools use.

The other names come from the options of timm's train.py, Ultralytics, Lightning, Keras and Hugging Face's
TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nearkin.errors import ConfigError, most_similar, nearest, printable

# Our option, with a value where the other name implies it -> what others call it.
_OPTIONS = {
    "accumulate": "accumulate-grad-batches accumulation-steps grad-accum grad-accum-steps grad-accumulation "
    "gradient-accumulation gradient-accumulation-steps nbs update-freq",
    "augment": "aa auto-augment augmentation augmentations data-augmentation trivial-augment",
    "batch-size": "auto-scale-batch-size b batch batchsize bs mini-batch-size per-device-batch-size "
    "per-device-train-batch-size train-batch-size",
    "cache": "cache-images cache-dataset",
    "channels": "in-channels in-chans input-channels num-channels",
    "class-weights": "class-weight label-weights weights-per-class",
    "clip-grad": "clip clip-grad-norm clip-norm clipnorm grad-clip gradient-clip gradient-clip-val "
    "gradient-clipping max-grad-norm",
    "compile": "torch-compile torchcompile",
    "config": "cfg conf config-file yaml",
    "crop-scale": "random-resized-crop",
    "cutmix": "cutmix-alpha",
    "decay-all": "bias-decay",
    "device": "accelerator device-ids devices",
    "device cpu": "cpu no-cuda",
    "device cuda": "cuda gpu gpu-id gpu-ids gpus",
    "drop-path": "drop-path-rate droppath stochastic-depth stochastic-depth-prob",
    "drop-rate": "drop dropout dropout-prob dropout-rate head-dropout",
    "ema": "ema-decay model-ema model-ema-decay",
    "epochs": "e epoch max-epochs n-epoch n-epochs nb-epoch nb-epochs num-epoch num-epochs num-train-epochs",
    "erasing": "random-erase random-erasing reprob",
    "eval-crop": "crop-pct",
    "eval-size": "eval-image-size test-input-size test-size val-size val-resize-size",
    "flip": "fliplr hflip horizontal-flip random-flip",
    "freeze-backbone": "feature-extract freeze freeze-encoder freeze-layers linear-probe",
    "grey-prob": "gray gray-prob grayscale greyscale grayscale-prob",
    "image-size": "crop-size image-dim image-width img img-dim img-size imgsize imgsz input-size res resize resolution "
    "train-crop-size",
    "images-per-class": "examples-per-class max-images-per-class samples-per-class shots",
    "jitter": "color-jitter colorjitter colour-jitter",
    "jitter-prob": "color-jitter-prob",
    "layer-decay": "layer-lr-decay layerwise-decay llrd",
    "log-every": "log-every-n-steps log-freq log-interval log-steps logging-steps p print-freq",
    "log-level": "verbose verbosity",
    "lr": "base-learning-rate base-lr blr eta init-lr initial-lr learn-rate learning-rate learning-rate-init "
    "learningrate lr0 max-lr",
    "memory-format channels_last": "channels-last",
    "min-lr-ratio": "eta-min final-lr lr-min lrf min-lr",
    "mixup": "mixup-alpha",
    "model": "a arch architecture backbone encoder m model-arch model-name model-type network",
    "momentum": "sgd-momentum",
    "objective": "criterion loss loss-fn loss-function loss-type method",
    "optimizer": "opt optim optimiser",
    "out": "checkpoint-dir default-root-dir dir experiment experiment-name exp-name log-dir logdir name o out-dir "
    "outdir output output-dir output-folder output-path project root-dir run-dir run-name save-dir save-folder "
    "save-path workdir work-dir",
    "precision": "amp-dtype dtype",
    "precision bf16": "amp autocast bf16 bfloat16 mixed-precision use-amp",
    "precision fp16": "fp16 half",
    "pretrained": "finetune imagenet pretrain use-pretrained",
    "quiet": "silent",
    "randaugment": "rand-augment randaug",
    "repeats": "aug-repeats num-aug-repeats repeated-aug",
    "resume": "ckpt-path continue resume-from resume-from-checkpoint",
    "sampler": "sampling",
    "sampler balanced": "balanced-sampler",
    "sampler weighted": "weighted-sampler",
    "save-minutes": "checkpoint-interval checkpoint-every save-every save-freq save-interval save-period save-steps",
    "seed": "manual-seed random-seed random-state rng-seed",
    "threads": "cpu-threads num-threads nthreads torch-threads",
    "val-split": "val-fraction val-pct val-ratio val-share valid-pct valid-split validation-fraction validation-split",
    "warmup-epochs": "lr-warmup-epochs num-warmup-epochs warm-up warm-up-epochs warmup warmup-iters warmup-steps",
    "weight-decay": "decay l2 l2-reg regularization wd weightdecay",
    "weights": "checkpoint ckpt from-checkpoint initial-checkpoint init-weights load load-weights pretrained-path "
    "pretrained-weights",
    "workers": "dataloader-num-workers j n-workers nb-workers num-data-workers num-proc num-workers nw worker",
    # Of predict, evaluate and fewshot.
    "shots": "k-shot n-shot num-shots shot",
    "ways": "k-way n-way num-ways way",
    "queries": "n-query num-queries query",
    "episodes": "n-episodes num-episodes num-tasks tasks",
    "tta": "augment-test test-time-augmentation test-time-aug",
    "json": "as-json output-json",
}

# Names that stand for no single option of ours, by the sentence that answers them.
_SENTENCES = {
    "data": "DATA is a word of its own, without an option.",
    "splits": "The splits are folders of DATA: DATA/train, DATA/val, DATA/test.",
    "classes": "nearkin takes the classes from DATA.",
    "stopping": "nearkin does not stop early; it keeps the best epoch by validation.",
    "smoothing": "It is an option of the objective: --objective.smoothing.",
    "temperature": "It is an option of the objective: see nearkin train --objective NAME --help.",
    "schedule": "The schedule is a linear warm-up and a cosine: see --warmup-epochs and --min-lr-ratio.",
    "processes": "Start one process per GPU: torchrun --nproc-per-node N -m nearkin ...",
    "steps": "nearkin counts in --epochs.",
}
_ANSWERED = {
    "data": "data-dir data-directory data-folder data-path data-root data-set dataset dataset-dir dataset-name "
    "dataset-path i image-dir image-folder images images-dir img-dir input input-dir input-path source train-data "
    "train-data-dir train-dir train-folder train-path",
    "splits": "eval-data test-data test-dir test-folder test-path val-data val-dir val-folder val-path valid-dir "
    "validation-data validation-dir",
    "classes": "class-names labels n-classes nb-classes nc num-class num-classes num-labels",
    "stopping": "early-stop early-stopping early-stopping-patience load-best-model-at-end patience",
    "smoothing": "label-smoothing label-smoothing-factor smoothing",
    "temperature": "margin tau temp temperature",
    "schedule": "cos-lr cosine decay-epochs gamma lr-decay lr-scheduler lr-scheduler-type lr-step-size sched schedule "
    "scheduler step-size",
    "processes": "dist distributed local-rank n-gpu ngpus nproc nproc-per-node num-devices num-gpus num-nodes "
    "sync-batchnorm world-size",
    "steps": "iterations iters max-iter max-iters max-steps n-iters num-iterations num-steps num-train-steps "
    "total-steps train-steps",
}

# Values of an option, and what others call them.
_VALUES: dict[str, dict[str, str]] = {
    "optimizer": {"adamw": "adam adam-w nadam radam", "sgd": "momentum nesterov sgd-momentum"},
    "objective": {
        "ce": "bce categorical-crossentropy cross-entropy cross-entropy-loss crossentropy crossentropyloss nll "
        "softmax xent",
        "supcon": "contrastive supervised-contrastive supcon-loss supconloss",
        "triplet": "triplet-loss triplet-margin tripletloss",
        "arcface": "additive-angular-margin arc-face arcface-loss",
        "cosface": "am-softmax amsoftmax cos-face",
        "sce": "symmetric-cross-entropy",
        "gpaco": "paco",
    },
    "precision": {
        "fp16": "16 16-mixed 16-true float16 half",
        "bf16": "amp bf16-mixed bf16-true bfloat16 mixed",
        "fp32": "32 32-true float float32 full single",
        "fp64": "64 64-true double float64",
    },
    "device": {"cuda": "0 cuda:0 gpu nvidia", "mps": "apple metal"},
    "sampler": {
        "shuffle": "random randomsampler",
        "balanced": "class-balanced",
        "weighted": "oversample weightedrandomsampler",
    },
    "augment": {"strong": "autoaugment heavy randaugment trivialaugment", "none": "false no off"},
    "cache": {"ram": "memory true", "off": "false no none"},
    "class-weights": {"balanced": "auto inverse true", "none": "false no off"},
    "memory-format": {"channels_last": "nhwc", "contiguous": "channels-first nchw"},
}


def _by_other_name(table: Mapping[str, str]) -> dict[str, str]:
    return {other: ours for ours, others in table.items() for other in others.split()}


_OURS, _ANSWERS = _by_other_name(_OPTIONS), _by_other_name(_ANSWERED)


def _plain(name: str) -> str:
    """A name as the tables spell it: lower case, hyphens, without leading hyphens."""
    return name.lower().replace("_", "-").lstrip("-")


def unknown_option(
    shown: str, known: Iterable[str], *, prefix: str = "--", otherwise: str = ""
) -> ConfigError:
    """The error for an option that is none of `known`, with a hint where there is one.

    shown: the option as it was given. prefix: what precedes the names of `known`, `--` or `--objective.`; the options
    of an objective have names of their own. otherwise: the hint where no name is similar.
    """
    ours = {_plain(option): option.replace("_", "-") for option in known}
    hints = {option: f"Did you mean {prefix}{name}?" for option, name in ours.items()}
    if prefix == "--":
        others = {
            other: f"nearkin calls it --{option}."
            for other, option in _OURS.items()
            if option.split()[0] in ours
        }
        hints = others | {other: _SENTENCES[key] for other, key in _ANSWERS.items()} | hints
    name = most_similar(_plain(shown.removeprefix(prefix)), hints)
    hint = hints.get(name, otherwise)
    return ConfigError(f"Unknown option {printable(shown)}.{hint and ' '}{hint}")


def value_hint(option: str, value: str, allowed: Iterable[str]) -> str:
    """` Did you mean X?` for the allowed value that is meant by `value`, or an empty string."""
    names = list(allowed)
    ours = _by_other_name(_VALUES.get(_plain(option), {})).get(_plain(value))
    return f" Did you mean {ours}?" if ours in names else nearest(value.lower(), names)
