"""A step never waits for the device: nothing in it asks for a number on the host."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nearkin.config import RunConfig, validate
from nearkin.distributed import Runtime
from nearkin.objectives import Objective
from nearkin.training.loop import legs
from nearkin.training.prepare import prepare
from nearkin.training.trainer import Trainer
from nearkin.types import Progress

ASKS = {
    "item",
    "cpu",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
}
# Operations whose result has a size that only the device knows, or that copy to the host.
OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
}
OPERATIONS |= {"aten::_unique2", "aten::equal", "aten::bincount"}


class Methods(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ASKS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in OPERATIONS:
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def waits(work):
    """What `work()` asked of the device."""
    with Methods() as methods, Dispatched() as dispatched:
        work()
    return methods.found + dispatched.found


CASES = {name: {} for name in sorted(Objective.registry)} | {
    "ce, mixed, clipped, averaged": {
        **{"objective": "ce", "augment": "strong", "clip_grad": 1.0, "ema": 0.9},
        **{"drop_rate": 0.2, "drop_path": 0.2, "optimizer": "adamw"},
    },
    "schane in parts": {"objective": "schane", "accumulate": 2, "batchnorm_by_parts": True},
}


def calls(case, runtime, folder):
    """Stage, number and call of the first steps of each stage."""
    options = {"objective": case} | CASES[case]
    common = {"images_per_class": 12, "batch_size": 16, "model": "test_resnet", "threads": 1}
    config = validate(RunConfig, common | {"epochs": 4, "image_size": 8} | options)
    trainer = Trainer(prepare(config, runtime), runtime, folder, quiet=True)
    stepper = trainer.stepper
    for leg in legs(trainer.stages, 4, trainer.steps_per_epoch):
        stepper.begin(leg.stage)
        batches = list(trainer._loader(leg.stage, leg.first, leg.first + 3))
        total = leg.last - leg.first
        for step, batch in enumerate(batches):
            progress = Progress(leg.stage.name, step + 10, total, 1, 2)
            yield leg.stage.name, step, partial(stepper.step, batch, progress, step)


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case, tmp_path):
    runtime = Runtime(device="cpu", precision="fp32")
    for stage, step, call in calls(case, runtime, tmp_path):
        found = waits(call)
        if step:  # the first step of a stage makes the optimiser's state
            assert found == [], (stage, step)
    runtime.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_a_gpu(case, precision, tmp_path):
    """torch's own check, which raises where a call of CUDA would wait."""
    runtime = Runtime(device="cuda", precision=precision)
    for _, step, call in calls(case, runtime, tmp_path):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    runtime.close()


def test_a_wait_would_be_found():
    tensor = torch.ones(3)
    assert waits(lambda: tensor.sum().item()) == ["item", "aten::_local_scalar_dense"]
    assert waits(lambda: bool(tensor.any())) != []
    assert waits(lambda: tensor.nonzero()) != []
    assert waits(lambda: tensor.tolist()) == ["tolist"]
