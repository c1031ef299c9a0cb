"""Many files are examined in processes, with the results of threads, whatever happens to a process."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_start_method

import numpy as np
import pytest
from tests.doctor.photos import write_photos
from torch.utils.data import get_worker_info

from nearkin.data.dataset import choose
from nearkin.data.sources.resolve import resolve
from nearkin.doctor import scan as scanning
from nearkin.doctor.inventory import Inventory
from nearkin.doctor.scan import scan


@pytest.fixture
def inventory(tmp_path):
    """48 images in chunks of 16, some of the second chunk damaged, of other sizes and twice there."""
    root = write_photos(tmp_path / "photos")
    (root / "train" / "bee" / "3.png").write_bytes(b"no image")
    (root / "train" / "bee" / "7.png").write_bytes((root / "train/ant/0.png").read_bytes())
    listing = resolve(str(root))
    return Inventory.of(
        choose(listing, channels="auto", val_split=0.0, seed=0, images_per_class=None)
    )


@pytest.fixture
def expected(inventory):
    return scan(inventory)


def same(found, expected):
    assert found.reasons == expected.reasons
    assert len(expected.reasons) == 1
    for column, right in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(column, right)


def in_threads_afterwards(monkeypatch):
    """Collects the parts that are left to threads."""
    left = []

    def threads(work, parts, *rest):
        left.extend(parts)
        return original(work, parts, *rest)

    original = scanning.in_threads
    monkeypatch.setattr(scanning, "in_threads", threads)
    monkeypatch.setattr(scanning, "MANY", 1)
    return left


def test_processes_find_what_threads_find(inventory, expected, monkeypatch):
    left = in_threads_afterwards(monkeypatch)
    same(scan(inventory), expected)
    assert left == []


@pytest.mark.skipif(get_start_method() != "fork", reason="needs a function that processes inherit")
def test_threads_go_on_where_a_process_died(inventory, expected, monkeypatch):
    def deadly(path, *rest, **options):
        if get_worker_info() is not None and path.endswith(b"train/bee/10.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return examine(path, *rest, **options)

    examine = scanning.examine
    monkeypatch.setattr(scanning, "examine", deadly)
    left = in_threads_afterwards(monkeypatch)
    same(scan(inventory), expected)
    assert left
