"""The checkpoint store in front of damaged, foreign and hostile checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path

import pytest
from store_cases import assert_same, saved, snapshot, unexpected

from nearkin.errors import ModelError
from nearkin.training.checkpoint.snapshot import Damaged, Snapshot, read
from nearkin.training.checkpoint.store import Store


def remake_manifest(folder: Path, **more: bytes) -> None:
    """What an attacker, or a newer version, would write: every hash fits."""
    for name, data in more.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    files = {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    write_manifest(folder, json.dumps({"files": files}, separators=(",", ":")))


def write_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def damaged(store: Store, bad: int, good: int) -> None:
    """Step `bad` is noticed, both are named, and the bytes of step `good` are used."""
    warnings: list[str] = []
    found = store.load_newest(warnings.append)
    assert len(warnings) == 1
    assert f"step-{bad:010d}" in warnings[0]
    assert f"step-{good:010d}" in warnings[0]
    assert isinstance(found, Snapshot)
    assert found.step == good
    with pytest.raises(Damaged, match=f"step-{bad:010d}"):
        read(store.path("step", bad))


def cases(folder: Path, count: int, seed: int) -> list[tuple[Path, int]]:
    """`count` bytes of the folder at random, and as many of its manifest and of its state."""
    draw = random.Random(seed)
    places = [
        (path, byte) for path in sorted(folder.iterdir()) for byte in range(path.stat().st_size)
    ]
    json_places = [place for place in places if place[0].suffix == ".json"]
    return draw.sample(places, count) + draw.sample(json_places, count)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    for number, (path, byte) in enumerate(cases(store.path("step", 2), 200, seed=0)):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[byte] ^= 1 << number % 8
        path.write_bytes(broken)
        damaged(store, bad=2, good=1)
        path.write_bytes(whole)
    assert_same(store.load_newest(unexpected), snapshot(2))


def test_every_truncation_and_every_longer_file_is_detected(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    for path, length in cases(store.path("step", 2), 200, seed=1):
        whole = path.read_bytes()
        for broken in (whole[:length], whole + b"\n"):
            path.write_bytes(broken)
            damaged(store, bad=2, good=1)
        path.write_bytes(whole)
    assert_same(store.load_newest(unexpected), snapshot(2))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_missing_file_is_detected(tmp_path: Path, name: str) -> None:
    store = saved(tmp_path, 1, 2)
    (store.path("step", 2) / name).unlink()
    damaged(store, bad=2, good=1)


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    for step in (1, 2):
        (store.path("step", step) / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"All 2 checkpoints .* manifest\.json"):
        store.load_newest(unexpected)


def test_a_newer_format_is_refused_by_its_number_and_never_skipped(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    remake_manifest(store.path("step", 2), state__json=b'{"format": 2, "novel": []}')
    with pytest.raises(ModelError, match="format 2") as error:
        store.load_newest(unexpected)
    assert not isinstance(error.value, Damaged)
    assert error.value.code == 4


@pytest.mark.parametrize(
    "state",
    [
        b"[]",
        b"{}",
        b"null",
        b'{"format": "1"}',
        b'{"format": 1, "step": 2}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, state: bytes) -> None:
    store = saved(tmp_path, 2)
    remake_manifest(store.path("step", 2), state__json=state)
    with pytest.raises(Damaged, match=r"state\.json"):
        read(store.path("step", 2))


@pytest.mark.parametrize("name", ["../x.safetensors", "..", "/x", "a/b", "", ".x", "a\n", "a\\b"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    store = saved(tmp_path / "run", 2)
    secret = tmp_path / "run" / "x.safetensors"
    secret.write_bytes(b"secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    path = store.path("step", 2)
    files = json.loads((path / "manifest.json").read_text())["files"]
    write_manifest(
        path, json.dumps({"files": files | {"ok.safetensors": entry}}, separators=(",", ":"))
    )
    with pytest.raises(Damaged, match=r"ok\.safetensors: No such file"):
        read(path)
    write_manifest(path, json.dumps({"files": files | {name: entry}}, separators=(",", ":")))
    with pytest.raises(Damaged, match=r"manifest\.json"):
        read(path)


def test_hostile_contents_are_refused(tmp_path: Path) -> None:
    store = saved(tmp_path, 2)
    path = store.path("step", 2)
    manifest = (path / "manifest.json").read_text()

    first = next(iter(json.loads(manifest)["files"].items()))
    twice = manifest.replace(
        '{"files":{', '{"files":{' + json.dumps({first[0]: first[1]})[1:-1] + ","
    )
    for text in (twice, manifest + " " * 2**20, manifest.replace(":", ": "), "[]", "[" * 10**5):
        write_manifest(path, text)
        with pytest.raises(Damaged, match=r"manifest\.json is not"):
            read(path)

    remake_manifest(path, evil__pkl=b"cos\nsystem\n.")
    with pytest.raises(Damaged, match=r"evil\.pkl"):
        read(path)
    (path / "evil.pkl").unlink()

    for start, stop in ((0, 2**40), (0, 8), (-4, 0)):  # declared larger than the file, or before it
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]}})
        data = struct.pack("<Q", len(header)) + header.encode() + bytes(4)
        remake_manifest(path, bank__safetensors=data)
        with pytest.raises(Damaged, match="no safetensors file"):
            read(path)


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    store = saved(tmp_path, 2)
    path = store.path("step", 2) / "bank.safetensors"
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(Damaged, match="not a plain file"):
        read(path.parent)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(Damaged, match="not a plain file"):
        read(path.parent)
