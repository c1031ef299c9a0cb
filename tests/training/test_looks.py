"""How often a run opens its image files: once, and never to print its options."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nearkin.config import RunConfig
from nearkin.data import cache as cache_room
from nearkin.data import look
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, DataError
from nearkin.training.api import resolved
from nearkin.training.prepare import prepare

OPTIONS = {"model": "test_resnet", "objective": "ce", "batch_size": 16}


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded to be looked at."""
    names: list[str] = []
    real = look.inspect

    def counting(path, *, full, **rest):
        if full:
            names.append(path)
        return real(path, full=full, **rest)

    monkeypatch.setattr(look, "inspect", counting)
    return names


def test_a_run_that_goes_on_can_do_without_its_cache(data, monkeypatch):
    """Where its machine has less shared memory; the network sees the same pixels."""
    runtime = Runtime(device="cpu", precision="fp32")
    config = RunConfig(**OPTIONS, data=str(data), cache="ram")
    first = prepare(config, runtime)
    monkeypatch.setattr(cache_room.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match="--cache ram needs about"):
        prepare(config, runtime)
    second = prepare(config, runtime, classes=first.dataset.classes)
    assert first.identity == second.identity
    images = [found.dataset.splits["train"].images for found in (first, second)]
    assert type(images[0]) is not type(images[1])
    runtime.close()


def test_printing_the_options_decodes_nothing(data, decoded):
    assert resolved({**OPTIONS, "data": str(data)}).image_size == 20
    assert decoded == []


@pytest.mark.parametrize(("cache", "again"), [("off", 0), ("disk", 0), ("ram", 40)])
def test_a_second_start_decodes_nothing_but_for_a_cache_in_memory(data, decoded, cache, again):
    runtime = Runtime(device="cpu", precision="fp32")
    config = RunConfig(**OPTIONS, data=str(data), cache=cache)
    first = prepare(config, runtime)
    assert len(decoded) == 40
    second = prepare(config, runtime, classes=first.dataset.classes)
    assert len(decoded) == 40 + again
    assert first.identity == second.identity
    runtime.close()


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_bad_images_are_left_out_with_a_cache_or_without(data, cache):
    (data / "a" / "2.png").write_bytes(b"no image")
    runtime = Runtime(device="cpu", precision="fp32")
    options = {**OPTIONS, "data": str(data), "cache": cache}
    with pytest.raises(DataError, match="1 of 40 images cannot be read: .*a/2.png"):
        prepare(RunConfig(**options), runtime)
    job = prepare(RunConfig(**options, bad_images="skip"), runtime)
    assert sum(len(split.labels) for split in job.dataset.splits.values()) == 39
    assert [image.path for image in job.dataset.bad] == [str(data / "a" / "2.png")]
    assert "1 unreadable image left out" in job.dataset.notes
    runtime.close()
