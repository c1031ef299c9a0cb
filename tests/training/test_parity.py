"""One process = two processes with the same global batch: loss, gradients, BatchNorm, teacher and bank.

Each step starts from the same saved state on both sides, since a free-running comparison in float32 is chaotic.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.processes import finish, ranks, start

from nearkin.objectives import Objective

STEPS = 6
QUICK = ("ce", "supcon", "cone")
COMMON = {
    "data": "digits",
    "images_per_class": 20,
    "batch_size": 32,
    "model": "test_resnet",
    "image_size": 8,
    "epochs": 2,
    "threads": 1,
}
HEAD = {"objective.hidden": 24, "objective.embedding": 12}
CASES = {
    "ce": {"objective": "ce", "drop_rate": 0.2, "objective.smoothing": 0.1},
    "ce-mixed": {"objective": "ce", "augment": "strong", "class_weights": "balanced"},
    "supcon": {"objective": "supcon", "objective.hidden": 24, "objective.projection": 12},
    "cone": {"objective": "cone", "objective.bank": 50, "objective.topk": 9, **HEAD},
    # In the warm-up no loss reads the projection.
    "cone-on-features": {
        **{"objective": "cone", "objective.bank": 50, "objective.topk": 9, **HEAD},
        "objective.classifier": "features",
    },
    "cone-own-crop": {
        **{"objective": "cone", "objective.bank": 64, "objective.topk": 9, **HEAD},
        **{"objective.teacher_crop": "own", "augment": "strong", "drop_path": 0.2, "ema": 0.9},
    },
    "supcon-balanced": {
        **{"objective": "supcon", "objective.views": 1, "objective.hidden": 24},
        **{"objective.projection": 12, "sampler": "balanced", "per_class": 4},
    },
    "cone-channels-last": {
        **{"objective": "cone", "objective.bank": 50, "objective.topk": 9, **HEAD},
        **{"memory_format": "channels_last", "image_size": 20},
    },
    "mean-teacher": {"objective": "attract-repulse", "stage": 1},
}
# Every other objective with its defaults: a new file gets this by existing.
CASES |= {name: {"objective": name} for name in sorted(Objective.registry) if name not in CASES}


def steps(options, folder, precision):
    """Take STEPS steps. Alone, write the state before and after each; in company, start each from what is there."""
    from nearkin.config import RunConfig, validate
    from nearkin.distributed import Runtime
    from nearkin.training.loop import legs
    from nearkin.training.prepare import prepare
    from nearkin.training.trainer import Trainer
    from nearkin.types import Progress

    if precision == "fp32":
        # At a rectifier's kink rounding decides whether a unit is on: which samples meet it differs from one
        # processor to the next, and a gradient then differs by parts in a thousand.
        torch.nn.ReLU.forward = lambda self, x: torch.nn.functional.gelu(x)
    runtime = Runtime(device="cpu", precision=precision)
    options = dict(options)
    number = options.pop("stage", 0)
    config = validate(RunConfig, COMMON | options | {"precision": precision})
    trainer = Trainer(prepare(config, runtime), runtime, folder, quiet=True)
    stepper, leg = trainer.stepper, None
    leg = legs(trainer.stages, config.epochs, trainer.steps_per_epoch)[number]
    stepper.begin(leg.stage)
    gradients = {}

    def keep(*_):
        for name, parameter in stepper.network.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    stepper.optimizer.register_step_pre_hook(keep)
    for step, batch in enumerate(trainer._loader(leg.stage, 0, STEPS)):
        before = folder / f"before-{step}"
        if runtime.world_size == 1:
            write(before, stepper.tensors())
        else:
            stepper.load(read(before))
        total = leg.last - leg.first
        loss = stepper.step(batch, Progress(leg.stage.name, step, total, 0, 1), step)
        after = stepper.tensors() | {"gradients": dict(gradients)}
        after["loss"] = {"total": loss.total.detach(), **loss.terms}
        if runtime.world_size == 1:
            write(folder / f"after-{step}", after)
        elif runtime.rank == step % 2:  # every rank must be right, so they take turns
            write(folder / f"pair-{step}", after)
    runtime.close()


def write(path, groups):
    flat = {
        f"{g}|{n}": t.detach().contiguous().clone()
        for g, ts in groups.items()
        for n, t in ts.items()
    }
    save_file(flat, path)


def read(path):
    groups = defaultdict(dict)  # safetensors keeps no empty group
    for key, tensor in load_file(path).items():
        group, name = key.split("|", 1)
        groups[group][name] = tensor
    return groups


def distance(one, other):
    """The norm of the difference over the norm, of all floating tensors of a group but those in bfloat16."""
    keys = [k for k in one if one[k].is_floating_point() and one[k].dtype != torch.bfloat16]
    difference = sum(((one[k] - other[k]).double() ** 2).sum() for k in keys)
    return float(
        (difference / sum((one[k].double() ** 2).sum() for k in keys).clamp(min=1e-300)) ** 0.5
    )


def compare(folder, tolerance):
    worst = {}
    for step in range(STEPS):
        one, two = read(folder / f"after-{step}"), read(folder / f"pair-{step}")
        assert one.keys() == two.keys()
        for group in one:
            assert one[group].keys() == two[group].keys()
            worst[group] = max(worst.get(group, 0.0), distance(one[group], two[group]))
            for name, tensor in one[group].items():
                if tensor.dtype == torch.bfloat16:
                    # What is stored in half precision may be rounded to the neighbour of what the other stores.
                    torch.testing.assert_close(two[group][name], tensor, rtol=2**-7, atol=1e-6)
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, two[group][name]), (group, name)
    assert max(worst.values()) <= tolerance, worst
    assert float(read(folder / "after-5")["loss"]["total"]) > 0
    return worst


def pair(options, folder, precision, log):
    assert finish(start(steps, options, folder, precision, log=log)) == [0], log.read_text()
    both = [start(steps, options, folder, precision, env=env, log=log) for env in ranks(2)]
    assert finish(*both) == [0, 0], log.read_text()


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_one_process_is_two_in_float64(case, tmp_path):
    pair(CASES[case], tmp_path, "fp64", tmp_path / "log")
    compare(tmp_path, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
def test_one_process_is_two_in_float32(case, tmp_path):
    pair(CASES[case], tmp_path, "fp32", tmp_path / "log")
    compare(tmp_path, 1e-5)


ACCUMULATE = {
    **{"objective": "cone", "objective.bank": 50, "objective.topk": 9, **HEAD},
    **{"accumulate": 2, "objective.teacher_batchnorm": "average"},
}


@pytest.mark.slow
def test_a_split_batch_writes_the_same_bank_once(tmp_path):
    """BatchNorm sees other parts on two processes, so gradients differ; what the bank holds does not."""
    pair(ACCUMULATE, tmp_path, "fp64", tmp_path / "log")
    for step in range(STEPS):
        one, two = read(tmp_path / f"after-{step}"), read(tmp_path / f"pair-{step}")
        assert distance(one["objective"], two["objective"]) <= 1e-10
        assert torch.equal(one["objective"]["bank.ids"], two["objective"]["bank.ids"])
        assert one["objective"]["bank.filled"] == min(50, 32 * (step + 1))


# A network without BatchNorm: there, splitting the batch is exact, however the loss couples it.
PLAIN = {
    "model": "test_vit",
    "image_size": 16,
    "drop_rate": 0.3,
    "drop_path": 0.2,
    "optimizer": "sgd",
}
LAYER_NORM = {"objective.head_norm": "layer"}
SPLIT = {
    "ce": {},
    "supcon": LAYER_NORM,
    "schane": {"augment": "strong"},
    "sigsup": LAYER_NORM,
    "gpaco": LAYER_NORM,
    "attract-repulse": LAYER_NORM,
    "triplet": {"objective.views": 2},
}


def first_gradients(name, options, folder, precision, log, world=1):
    """Of the first step, from the state that every such run starts with."""
    folder.mkdir(exist_ok=True)
    words = {"objective": name} | PLAIN | SPLIT[name] | options
    env = [{}] if world == 1 else ranks(world)
    assert (
        finish(*[start(steps, words, folder, precision, env=e, log=log) for e in env])
        == [0] * world
    ), log.read_text()
    return read(folder / ("after-0" if world == 1 else "pair-0"))


@pytest.mark.parametrize(
    "name", [n if n in ("ce", "supcon") else pytest.param(n, marks=pytest.mark.slow) for n in SPLIT]
)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, precision, tolerance, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "whole"
    whole = first_gradients(name, {}, folder, precision, log)
    parts = first_gradients(name, {"accumulate": 4}, tmp_path / "parts", precision, log)
    assert whole["gradients"].keys() == parts["gradients"].keys()
    assert distance(whole["gradients"], parts["gradients"]) <= tolerance
    assert distance(whole["loss"], parts["loss"]) <= tolerance
    assert distance(whole["network"], parts["network"]) <= tolerance


@pytest.mark.slow
def test_parts_on_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    whole = first_gradients("schane", {}, folder, "fp64", log)
    parts = first_gradients("schane", {"accumulate": 2}, folder, "fp64", log, world=2)
    assert distance(whole["gradients"], parts["gradients"]) <= 1e-10


def test_parts_without_the_two_passes_would_be_seen(tmp_path):
    """The same comparison finds the gradient of a loss that couples parts only, so it can fail."""
    log = tmp_path / "log"
    whole = first_gradients("schane", {}, tmp_path / "whole", "fp64", log)
    blocks = {"objective.within": 8}
    parts = first_gradients("schane", blocks, tmp_path / "parts", "fp64", log)
    assert distance(whole["gradients"], parts["gradients"]) > 1e-3


@pytest.mark.slow
def test_the_comparison_sees_a_wrong_gradient(tmp_path):
    pair(CASES["ce"], tmp_path, "fp64", tmp_path / "log")
    groups = read(tmp_path / "pair-3")
    next(iter(groups["gradients"].values())).mul_(1.001)
    write(tmp_path / "pair-3", groups)
    with pytest.raises(AssertionError):
        compare(tmp_path, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    ["--epochs 1 --images-per-class 40", "--minutes 0.2 --images-per-class 4 --batch-size 2"],
)
def test_torchrun_trains_a_whole_run(tmp_path, given):
    """The second with one image in each process, planned and trained: BatchNorm sees the batch."""
    words = ["train", "digits", *given.split(), "--threads", "1", "--json"]
    done = subprocess.run(
        [
            *[
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--standalone",
            ],
            *["-m", "nearkin", *words, "--out", str(tmp_path / "run")],
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_top1") == 1  # one rank tells
    assert (tmp_path / "run" / "model.safetensors").exists()
