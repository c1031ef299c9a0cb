"""`--compile` changes the time of a step, not its result, and compiles once."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from tests.training.settings_cases import settings
from torch import nn
from torch._dynamo.testing import CompileCounter

from nearkin.config import RunConfig
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError
from nearkin.training.api import running
from nearkin.training.loop import legs
from nearkin.training.prepare import _say_doubts, prepare
from nearkin.training.trainer import Trainer
from nearkin.types import Progress

STEPS = 3


@pytest.fixture
def traced(monkeypatch):
    """Compiling without a compiler: the code is followed, then run as it is, and counted."""
    counter = CompileCounter()
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(plain, backend=counter))
    torch.compiler.reset()
    yield counter
    torch.compiler.reset()


def trained(tmp_path, counter=None, **options):
    """The stepper and its losses after some steps; what is compiled is compiled in the first."""
    small = {"model": "test_resnet", "epochs": 2, "batch_size": 32, "threads": 1}
    runtime = Runtime(device="cpu", precision="fp32")
    config = RunConfig(**(small | {"images_per_class": 10} | options))
    trainer = Trainer(prepare(config, runtime), runtime, tmp_path, quiet=True)
    (leg, *_) = legs(trainer.stages, 2, trainer.steps_per_epoch)
    stepper = trainer.stepper
    stepper.begin(leg.stage)
    losses = []
    for step, batch in enumerate(trainer._loader(leg.stage, 0, STEPS)):
        progress = Progress(leg.stage.name, step, STEPS, 0, 1)
        losses.append(stepper.step(batch, progress, step).total.detach())
        if counter is not None and step == 0:
            first = counter.frame_count
    if counter is not None:
        assert counter.frame_count == first > 0
    return stepper, torch.stack(losses)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "ce"},
        {"objective": "cone"},
        {"objective": "ce", "drop_path": 0.3, "drop_rate": 0.1},
        {
            "objective": "supcon",
            "options": {"head_norm": "layer"},
            "accumulate": 2,
            "model": "test_vit",
            "image_size": 32,
        },
    ],
    ids=str,
)
def test_the_result_and_the_names_stay(tmp_path, traced, options):
    plain, losses = trained(tmp_path, **options)
    compiled, same = trained(tmp_path, traced, compile=True, **options)
    assert compiled.network._compiled
    torch.testing.assert_close(same, losses, rtol=1e-5, atol=1e-6)
    theirs, ours = plain.network.state_dict(), compiled.network.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    if compiled.teacher is not None:
        assert compiled.teacher.network.backbone._compiled_call_impl is not None


def test_evaluation_is_not_compiled(tmp_path, traced):
    stepper, _ = trained(tmp_path, traced, objective="ce", compile=True)
    network = stepper.network.eval()
    compiled = traced.frame_count
    with torch.no_grad():
        for rows in (1, 2, 3, 5):  # each would be compiled anew
            network(torch.zeros(rows, 1, 8, 8, dtype=torch.uint8))
    assert traced.frame_count == compiled


def test_masks_differ_from_step_to_step_though_nothing_is_compiled_again(tmp_path, traced):
    stepper, _ = trained(tmp_path, traced, objective="ce", drop_path=0.5, compile=True)
    network, compiled = stepper.network.train(), traced.frame_count
    outputs = []
    for step in (0, 1, 0):
        network.key.set(0, step, 0, 1)
        outputs.append(network(torch.zeros(32, 1, 8, 8, dtype=torch.uint8)).features)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert traced.frame_count == compiled


def test_a_missing_compiler_is_one_sentence():
    with (
        pytest.raises(ConfigError, match=r"--compile needs a C\+\+ compiler"),
        running(RunConfig(device="cpu")),
    ):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ...")


@pytest.mark.parametrize(
    ("device", "compiled", "warned"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)],
)
def test_a_gpu_is_warned_of_the_one_trial(capsys, device, compiled, warned):
    given = settings(100, 1000, device, compile=compiled)
    small = RunConfig(data="digits", objective="ce", model="test_resnet")
    built = prepare(small, Runtime(device="cpu", precision="fp32"), quiet=True).built
    _say_doubts(given, RunConfig(), built, quiet=False)
    assert ("--compile lost accuracy" in capsys.readouterr().err) == warned
