"""`--autotune` takes what is fastest, of what was left open, and leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
import yaml

from nearkin import train
from nearkin.config import RunConfig
from nearkin.distributed import Runtime
from nearkin.training import autotune
from nearkin.training.autotune import NAMES, Choice, tune
from nearkin.training.prepare import prepare

ALL = frozenset(NAMES)


@pytest.fixture(scope="module")
def job():
    small = {"model": "test_resnet", "epochs": 1, "batch_size": 16, "images_per_class": 5}
    runtime = Runtime(device="cpu", precision="fp32")
    return prepare(RunConfig(objective="ce", **small), runtime), runtime


@pytest.fixture
def planted(monkeypatch):
    """Seconds of each choice are those of a table; what is tried is written down."""
    monkeypatch.setattr(autotune, "cores", lambda: 4)
    tried = []

    def plant(**seconds):
        def measure(choice, network, images):
            tried.append(choice)
            return seconds.get(f"{choice}".replace(" thread(s)", "").replace(" ", "_"), 1.0)

        monkeypatch.setattr(autotune, "timed", measure)
        return tried

    return plant


def tuned_settings(job, automatic=ALL):
    made, runtime = job
    return tune(made.settings, automatic, made.built.network, 1, runtime)


def chosen(result) -> Choice:
    return Choice(*(getattr(result.settings, name) for name in NAMES))


def test_the_fastest_of_each_option_is_built_upon(job, planted):
    tried = planted(bf16_contiguous_1=0.8, bf16_channels_last_1=0.5, bf16_channels_last_4=0.3)
    result = tuned_settings(job)
    assert chosen(result) == Choice("bf16", "channels_last", 4)
    assert {choice.threads for choice in tried} == {1, 2, 4}
    assert not any(c.precision == "fp32" and c.memory_format == "channels_last" for c in tried)
    assert f"{result}".startswith("autotune: bf16 channels_last 4 thread(s) chosen of fp32 cont")


def test_a_little_faster_is_no_reason(job, planted):
    planted(fp32_channels_last_1=0.97, bf16_contiguous_1=0.96)
    assert chosen(tuned_settings(job)) == Choice("fp32", "contiguous", 1)


def test_the_hopeless_is_tried_once(job, planted):
    tried = planted(bf16_contiguous_1=3.0)
    tuned_settings(job)
    assert tried.count(Choice("bf16", "contiguous", 1)) == 1
    assert tried.count(Choice("fp32", "channels_last", 1)) == 1 + autotune.ROUNDS


@pytest.mark.parametrize("name", NAMES)
def test_what_was_asked_for_is_not_tried(job, planted, name):
    tried = planted()
    tuned_settings(job, ALL - {name})
    assert len({getattr(choice, name) for choice in tried}) == 1


def test_when_time_is_up_the_rest_stays(job, planted, monkeypatch):
    tried = planted()
    monkeypatch.setattr(autotune, "PATIENCE", -1.0)
    assert chosen(tuned_settings(job)) == Choice("fp32", "contiguous", 1)
    assert tried == []


def test_neither_the_network_nor_the_random_state_is_touched(job, monkeypatch):
    monkeypatch.setattr(autotune, "cores", lambda: 1)
    made, _ = job
    before = {n: v.clone() for n, v in made.built.network.state_dict().items()}
    training = made.built.network.training
    state = torch.get_rng_state()
    result = tuned_settings(job, frozenset({"memory_format"}))
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert made.built.network.training == training
    assert all(torch.equal(v, before[n]) for n, v in made.built.network.state_dict().items())
    assert all(p.grad is None for p in made.built.network.parameters())


def test_the_first_process_decides(job, planted, monkeypatch):
    planted(fp32_channels_last_1=0.5)
    _, runtime = job
    theirs = Choice("bf16", "contiguous", 2)
    monkeypatch.setattr(type(runtime), "share", lambda self, value: theirs)
    assert chosen(tuned_settings(job)) == theirs


def test_a_run_stores_and_keeps_what_was_chosen(tmp_path, planted):
    tried = planted(bf16_contiguous_1=0.5)
    options = {"model": "test_resnet", "epochs": 1, "images_per_class": 4, "batch_size": 16}
    run = train("digits", "ce", out=tmp_path / "run", autotune=True, **options).run
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert (stored["precision"], stored["memory_format"]) == ("bf16", "contiguous")
    tried.clear()
    (run / "status.json").unlink()  # as if it had not ended
    train(resume=run)
    assert tried == []
