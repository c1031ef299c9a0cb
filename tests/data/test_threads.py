"""Files are asked for size and time side by side: on a file system of a network each answer takes a while."""

import os
import threading
import time
from contextlib import closing

import pytest

from nearkin.data import threads
from nearkin.data.cache import Contents
from nearkin.data.dataset import load_dataset, sizes_of
from nearkin.data.look import look
from nearkin.data.sources.listing import FileList
from nearkin.data.sources.resolve import resolve
from nearkin.evaluation.ensemble import images_digest
from pictures import write_classes


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "cache"))
    return write_classes(tmp_path / "data", each=150)


@pytest.fixture
def together(monkeypatch):
    """The most files that were asked for at one time. An answer takes a while, as from a network."""
    most, now, lock, own = [0], [0], threading.Lock(), os.stat

    def slow(path, **options):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.001)
        with lock:
            now[0] -= 1
        return own(path, **options)

    monkeypatch.setattr(os, "stat", slow)
    return most


def test_each_status_comes_in_order_and_a_missing_file_has_none(tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03}.png").write_bytes(b"x" * number)
    (tmp_path / "007.png").unlink()
    files = FileList.pack(str(tmp_path), (b"%03d.png" % number for number in range(200)))
    found = list(threads.statuses([*files, "with\0nul"]))
    sizes = [None if status is None else status.st_size for status in found]
    assert sizes == [*range(7), None, *range(8, 200), None]


@pytest.mark.parametrize(
    "ask",
    [
        lambda data, root: data.fingerprint,
        lambda data, root: sizes_of(resolve(str(root))),
        lambda data, root: images_digest(data.splits["train"]),
        lambda data, root: Contents(data.files, 16).key(),
        lambda data, root: look(data.files, "auto"),
    ],
    ids=["fingerprint", "sizes", "digest", "cache", "look"],
)
def test_files_are_asked_for_side_by_side(root, together, ask):
    data = load_dataset(str(root))  # looked at, so that nothing is decoded below
    before = threading.active_count()
    together[0] = 0
    first = ask(data, root)
    assert together[0] >= 3  # of 270 and more files, 64 to a task
    assert ask(data, root) == first
    assert threading.active_count() == before  # a fork would not find them


def test_threads_end_when_the_caller_leaves_early():
    done = []

    def work(number):
        done.append(number)
        time.sleep(0.01)
        return number

    with closing(threads.in_threads(work, range(1000), 2, 10)) as chunks:
        assert next(chunks) == list(range(10))
    left = len(done)
    time.sleep(0.2)
    assert len(done) <= left + 2
