"""What a stage starts with."""

from __future__ import annotations

import torch

from nearkin.config import RunConfig
from nearkin.runtime import Runtime
from nearkin.train.job import prepare
from nearkin.train.loop import legs
from nearkin.train.session import Session
from nearkin.types import Progress


def test_a_new_stage_averages_from_its_own_start(tmp_path):
    """After the first step of every stage the average is the mean of the start and of the weights now."""
    runtime = Runtime(device="cpu", precision="fp32")
    options = {"mode": "two-stage"}
    config = RunConfig(objective="supcon", options=options, ema=0.999, images_per_class=10)
    config = config.model_copy(
        update={"model": "test_resnet", "epochs": 2, "batch_size": 32, "threads": 1}
    )
    session = Session(prepare(config, runtime), runtime, tmp_path, quiet=True)
    learner = session.learner
    for leg in legs(session.stages, 2, session.steps_per_epoch):
        learner.begin(leg.stage)
        start = {n: p.detach().clone() for n, p in learner.network.named_parameters()}
        for batch in session._loader(leg.stage, leg.first, leg.first + 1):
            progress = Progress(leg.stage.name, 0, leg.last - leg.first, 0, 1)
            learner.step(batch, progress, leg.first)
        mean = dict(learner.judged().named_parameters())
        moved = 0
        for name, now in learner.network.named_parameters():
            assert torch.allclose(mean[name], (start[name] + now) / 2, atol=1e-6), name
            moved += not torch.equal(now, start[name])
        assert moved > 0
