"""The checkpoint store on a healthy disk: round trips, order, retention, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from store_cases import FLOATS, assert_same, names, saved, snapshot, unexpected

from nearkin.errors import DivergedError, ModelError
from nearkin.training.checkpoint.snapshot import Snapshot, read
from nearkin.training.checkpoint.store import Store


def test_round_trip_gives_every_bit_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    store = Store(tmp_path / "run" / "checkpoints")
    path = store.save(snapshot(7))
    assert path == tmp_path / "run" / "checkpoints" / "step-0000000007"
    assert names(path) == ["bank.safetensors", "manifest.json", "model.safetensors", "state.json"]
    assert json.loads((path / "state.json").read_text())["format"] == 1
    assert_same(read(path), snapshot(7))
    assert_same(store.load_newest(unexpected), snapshot(7))


def test_shared_and_strided_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"a": base, "b": base, "row": base[1], "column": base[:, 1], "t": base.t()}
    store = Store(tmp_path)
    loaded = read(store.save(Snapshot(1, {"m": tensors}, {}))).tensors["m"]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    loaded["a"].add_(1)
    assert torch.equal(loaded["b"], base)


def test_large_finite_numbers_are_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    largest = {
        str(dtype): torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in FLOATS
    }
    assert_same(read(store.save(Snapshot(1, {"m": largest}, {}))), Snapshot(1, {"m": largest}, {}))


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path / "missing").load_newest(unexpected) is None
    assert Store(tmp_path).load_newest(unexpected) is None
    assert names(tmp_path) == []


def test_newest_is_the_highest_step_never_the_latest_time(tmp_path: Path) -> None:
    store = saved(tmp_path, 9, 10)
    os.utime(store.path("step", 10), (0, 0))
    os.utime(store.path("step", 9), (2**32, 2**32))
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-0000000099.bak").mkdir()
    assert_same(store.load_newest(unexpected), snapshot(10))


def test_saving_a_step_again_keeps_the_first(tmp_path: Path) -> None:
    store = saved(tmp_path, 3)
    before = store.path("step", 3).stat().st_ino
    other = snapshot(3)._replace(state={"other": True})
    assert store.save(other) == store.path("step", 3)
    assert store.path("step", 3).stat().st_ino == before
    assert_same(store.load_newest(unexpected), snapshot(3))


def test_saving_a_damaged_step_again_replaces_it(tmp_path: Path) -> None:
    store = saved(tmp_path, 3)
    (store.path("step", 3) / "state.json").write_bytes(b"{}")
    store.save(snapshot(3))
    assert_same(store.load_newest(unexpected), snapshot(3))
    assert names(tmp_path) == ["step-0000000003"]


def test_the_newest_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 10, 100)
    assert names(tmp_path) == [f"step-{step:010d}" for step in (10, 100)]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-0000000002" / "state.json").unlink()
    Store(tmp_path).save(snapshot(3))
    assert names(tmp_path) == [f"step-{step:010d}" for step in (1, 2, 3)]
    Store(tmp_path).save(snapshot(4))
    assert names(tmp_path) == [f"step-{step:010d}" for step in (3, 4)]


def test_best_stays_while_a_kept_step_refers_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        if step == best:
            store.save(snapshot(step), "best")
        store.save(snapshot(step, best))
        referred = {2: [1], 3: [1], 4: [1, 4], 5: [4]}.get(step)
        if referred:
            assert [path.name for path in store.paths("best")] == [
                f"best-{number:010d}" for number in reversed(referred)
            ]
    store.save(snapshot(6), "best")  # the newest stays before any step refers to it
    assert [path.name[-1] for path in store.paths("best")] == ["6", "4"]
    assert_same(read(store.path("best", 4)), snapshot(4))


def test_every_best_stays_while_a_kept_step_is_unreadable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2):
        store.save(snapshot(step), "best")
        store.save(snapshot(step, step))
    (store.path("step", 1) / "state.json").write_bytes(b"{}")
    store = Store(tmp_path)
    store.save(snapshot(3), "best")
    assert [path.name[-1] for path in store.paths("best")] == ["3", "2", "1"]
    store.save(snapshot(3, 2))  # two whole ones at last: the unreadable one goes
    assert [path.name[-1] for path in store.paths("best")] == ["3", "2"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_no_number_that_is_not_finite_is_published(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    store = saved(tmp_path, 1)
    tensors = {"good": {"x": torch.ones(2)}, "opt": {"m": torch.tensor([1, bad]).to(dtype)}}
    with pytest.raises(DivergedError, match=r"step 2 .* opt/m"):
        store.save(Snapshot(2, tensors, {}))
    with pytest.raises(DivergedError, match=r"step 2 .* state"):
        store.save(Snapshot(2, {}, {"best": {"value": bad}}))
    assert names(tmp_path) == ["step-0000000001"]


def test_no_checkpoint_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere cannot be used"):
        read(tmp_path / "nowhere")
