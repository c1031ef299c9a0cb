"""The store killed, or refused by the disk, at every call of a save that changes the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store_cases import assert_same, names, saved, snapshot, unexpected

from nearkin.files import SaveFailed, write_atomic
from nearkin.training.checkpoint import snapshot as snapshots
from nearkin.training.checkpoint.snapshot import read
from nearkin.training.checkpoint.store import Store

CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


class Torn:
    """A file of which only the first half of a write reaches the disk when the fault strikes."""

    def __init__(self, file: Any, strike: Callable[[str], None]) -> None:
        self.file, self.strike = file, strike

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.strike("write")
        return self.file.write(data[len(data) // 2 :])


class Faults:
    """Counts the calls that change the disk, and lets `fault` act at the chosen ones."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fault: Callable[[], None] = lambda: None
        self.chosen: Callable[[int], bool] = lambda number: False
        for name in CALLS:
            patch.setattr(os, name, self.watched(name, getattr(os, name)))
        real = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real(path, mode, *args, **kwargs)
            return Torn(file, self.strike) if "x" in mode else file

        patch.setattr(Path, "open", opened)
        write = os.write

        def torn(descriptor: int, data: memoryview) -> int:
            half = write(descriptor, data[: len(data) // 2])
            self.strike("write")
            return half + write(descriptor, data[half:])

        patch.setattr(os, "write", torn)

    def watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.strike(name)
            return real(*args, **kwargs)

        return call

    def strike(self, name: str) -> None:
        self.calls.append(name)
        if self.chosen(len(self.calls) - 1):
            self.fault()


def two_steps(folder: Path) -> None:
    store = Store(folder)
    for step in (1, 2):
        store.save(snapshot(step), "best")
        store.save(snapshot(step, step))


def third_step(folder: Path) -> None:
    """Publishes a best and a step, and retires an older one of each."""
    store = Store(folder)
    store.save(snapshot(3), "best")
    store.save(snapshot(3, 3))


def count_calls(folder: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        third_step(folder)
    return faults.calls


def digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of a checkpoint."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def assert_survived(folder: Path) -> None:
    """Old or new, whole, with its best, no warning; and the next save leaves nothing over."""
    store = Store(folder)
    newest = store.load_newest(unexpected)
    assert newest is not None
    assert newest.step in (2, 3)
    assert_same(newest, snapshot(newest.step, newest.step))
    assert_same(read(store.path("best", newest.step)), snapshot(newest.step))
    third_step(folder)
    assert names(folder) == [f"{kind}-{step:010d}" for kind in ("best", "step") for step in (2, 3)]
    assert_same(store.load_newest(unexpected), snapshot(3, 3))


def refusing(code: int) -> Callable[[], None]:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def die_in_child(folder: Path, number: int) -> int:
    """The exit status of a process that dies at call `number` of the save, with no cleaning up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            faults = Faults(pytest.MonkeyPatch())
            faults.chosen = lambda call: call == number
            faults.fault = lambda: os._exit(9)
            third_step(folder)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_every_call_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    two_steps(tmp_path / "start")
    calls = count_calls(Path(shutil.copytree(tmp_path / "start", tmp_path / "count")))
    assert {"write", "fsync", "mkdir", "rename", "rmdir", "unlink"} == set(calls)
    seen = set()
    for number in range(len(calls)):
        folder = Path(shutil.copytree(tmp_path / "start", tmp_path / f"{number}"))
        assert die_in_child(folder, number) == 9
        newest = Store(folder).load_newest(unexpected)
        seen.add(newest and newest.step)
        assert_survived(folder)
        shutil.rmtree(folder)
    assert seen == {2, 3}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_a_refusal_at_every_call_leaves_the_old_untouched(
    tmp_path: Path, code: int, lasting: bool
) -> None:
    two_steps(tmp_path / "start")
    calls = count_calls(Path(shutil.copytree(tmp_path / "start", tmp_path / "count")))
    for number in range(len(calls)):
        folder = Path(shutil.copytree(tmp_path / "start", tmp_path / f"{number}"))
        old = [folder / f"{kind}-0000000002" for kind in ("best", "step")]
        before = [digest(path) for path in old]
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch)
            faults.fault = refusing(code)
            faults.chosen = (lambda c: c >= number) if lasting else (lambda c: c == number)  # noqa: B023
            with pytest.raises(SaveFailed, match=os.strerror(code)) as error:
                third_step(folder)
        assert error.value.code == 75
        assert [digest(path) for path in old] == before
        assert lasting or "saved, but" in str(error.value) or not list(folder.glob(".tmp-*"))
        assert_survived(folder)
        shutil.rmtree(folder)


def test_files_reach_the_disk_before_the_name_and_the_name_before_removals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    events: list[tuple[str, str]] = []
    real = {"fsync": os.fsync, "rename": os.rename}

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        paths = [tmp_path, *tmp_path.rglob("*")]
        events.append(("fsync", next(p.name for p in paths if p.stat().st_ino == inode)))
        real["fsync"](descriptor)

    def rename(old: Any, new: Any) -> None:
        events.append((Path(old).name, Path(new).name))
        real["rename"](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    saved(tmp_path, 3)
    assert events == [
        ("fsync", "state.json"),
        ("fsync", "model.safetensors"),
        ("fsync", "bank.safetensors"),
        ("fsync", "manifest.json"),
        ("fsync", ".tmp-step-0000000003"),
        (".tmp-step-0000000003", "step-0000000003"),
        ("fsync", tmp_path.name),
        ("step-0000000001", ".tmp-step-0000000001"),
    ]


def test_what_the_disk_does_not_give_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 1)

    def rot(path: Path, data: bytes) -> None:
        path.write_bytes(data[:-1] + b"?" if path.name == "bank.safetensors" else data)

    monkeypatch.setattr(snapshots, "write_synced", rot)
    with pytest.raises(SaveFailed, match=r"read back, .* bank\.safetensors"):
        store.save(snapshot(2))
    assert names(tmp_path) == ["step-0000000001"]


FULL_DISK = """
    import sys
    from pathlib import Path
    import torch
    from nearkin.files import SaveFailed
    from nearkin.training.checkpoint.snapshot import Snapshot
    from nearkin.training.checkpoint.store import Store

    def sized(step, numbers):
        return Snapshot(step, {"model": {"w": torch.full((numbers,), float(step))}}, {})

    def explode(text):
        raise AssertionError(text)

    folder = Path(sys.argv[1]) / "checkpoints"
    store = Store(folder)
    store.save(sized(1, 100_000))
    for step in (2, 3):
        try:
            store.save(sized(step, 1_000_000))
        except SaveFailed as error:
            assert "No space left on device" in str(error), error
        else:
            raise AssertionError("4 MB fitted into 2 MB")
        assert [path.name for path in folder.iterdir()] == ["step-0000000001"]
        assert store.load_newest(explode).tensors["model"]["w"].eq(1).all()
    store.save(sized(4, 100_000))
    assert store.load_newest(explode).step == 4
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=2m tmpfs "$0"'
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    if subprocess.run([*mounted, mount, tmp_path], capture_output=True).returncode:
        pytest.skip("needs a kernel that lets this user mount a tmpfs")
    script = textwrap.dedent(FULL_DISK)
    command = [*mounted, f'{mount} && exec "$@"', tmp_path, sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_atomic_write_refused_or_not_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, b"old")
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        write_atomic(path, b"new")
        assert faults.calls == ["unlink", "write", "fsync", "replace", "fsync"]
        faults.calls.clear()
        for number in range(5):
            faults.calls.clear()
            faults.chosen = lambda call: call == number  # noqa: B023
            faults.fault = refusing(errno.ENOSPC)
            with pytest.raises(SaveFailed, match=r"status\.json could not be written: No space"):
                write_atomic(path, b"newer")
            assert path.read_bytes() == (b"newer" if number == 4 else b"new")
            assert names(tmp_path) == ["status.json"]


def test_an_atomic_write_does_not_follow_a_link_that_someone_left(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    number = zlib.crc32(b"status.json")
    left = tmp_path / f".tmp-status.json-{number:08x}-{os.getpid()}"
    left.symlink_to(tmp_path / "theirs")
    write_atomic(tmp_path / "status.json", b"ours")
    assert not left.is_symlink()
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "status.json").read_bytes() == b"ours"


def test_threads_write_files_whose_long_names_begin_alike(tmp_path: Path) -> None:
    """As the options of trials that start at the same time."""
    paths = [tmp_path / f"{'x' * 60}-{number}.yaml" for number in range(8)]
    together = threading.Barrier(len(paths))

    def write(path: Path) -> None:
        for _ in range(20):
            together.wait()
            write_atomic(path, path.name.encode())

    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(write, paths))
    assert [path.read_text() for path in paths] == [path.name for path in paths]
    assert names(tmp_path) == sorted(path.name for path in paths)


def test_nothing_is_saved_or_removed_through_a_link(tmp_path: Path) -> None:
    """Someone else's run folder may hold one."""
    theirs = tmp_path / "theirs"
    saved(theirs, 1)
    Store(theirs).save(snapshot(2), kind="best")
    (theirs / ".tmp-step-0000000001").mkdir()
    before = names(theirs)
    (tmp_path / "checkpoints").symlink_to(theirs)
    store = Store(tmp_path / "checkpoints")
    with pytest.raises(SaveFailed, match="the folder is a link"):
        store.save(snapshot(3))
    with pytest.raises(SaveFailed, match="the folder is a link"):
        store.cut_back(0)
    assert names(theirs) == before


def test_only_temporary_folders_of_the_store_are_removed(tmp_path: Path) -> None:
    own = [".tmp-step-0000000001", ".tmp-damaged-best-0000000002"]
    for name in (*own, ".tmp-mine"):
        (tmp_path / name).mkdir()
    saved(tmp_path, 3)
    assert names(tmp_path) == [".tmp-mine", "step-0000000003"]
