"""The first process of a machine builds the cache; all read it, and all learn why there is none."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tests.processes import finish, ranks, start

from nearkin.cli import run as command

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def look(data, out, where):
    """Prepare a run and write down what this process sees of its images."""
    from nearkin.config import RunConfig
    from nearkin.distributed import Runtime
    from nearkin.training.prepare import prepare

    options = {"model": "test_resnet", "image_size": 16, "batch_size": 16, "cache": where}
    with Runtime(device="cpu", precision="fp32") as runtime:
        job = prepare(RunConfig(data=str(data), objective="ce", **options), runtime)
        images = job.dataset.splits["train"].images
        folder = str(images.pack.folder)
        runtime.barrier()
        total = sum(int(images.read(row).to(torch.int64).sum()) for row in range(len(images)))
        seen = {"folder": folder, "sum": total, "there": os.path.isdir(folder)}
        runtime.barrier()
    (out / f"{runtime.rank}.json").write_text(json.dumps(seen))


def seen(tmp_path, data, world, where="ram", **env):
    out = tmp_path / f"out-{world}-{where}"
    out.mkdir()
    started = [
        start(look, data, out, where, env=rank | env, log=out / f"log-{number}")
        for number, rank in enumerate(ranks(world))
    ]
    assert finish(*started) == [0] * world, (out / "log-0").read_text()
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_two_processes_read_what_one_has_built(tmp_path, data, where):
    kept = {"NEARKIN_CACHE_DIR": str(tmp_path / "kept")}
    (alone,) = seen(tmp_path, data, 1, where, **kept)
    one, two = seen(tmp_path, data, 2, where, **kept)
    assert one == two
    assert one["there"]
    assert one["sum"] == alone["sum"]
    assert os.path.isdir(one["folder"]) == (where == "disk")


def test_both_processes_end_when_there_is_none(tmp_path, data):
    (tmp_path / "file").write_text("")
    broken = {"NEARKIN_CACHE_DIR": str(tmp_path / "file" / "x")}
    words = ["train", str(data), "--objective", "ce", "--model", "test_resnet", "--cache", "disk"]
    words += ["--image-size", "16", "--batch-size", "16", "--quiet", "--out", str(tmp_path / "run")]
    log = tmp_path / "log"
    assert finish(*(start(command, words, env=env | broken, log=log) for env in ranks(2))) == [3, 3]
    text = log.read_text()
    assert text.count("\n") == 1
    assert "cannot be made" in text
