"""Predictions are written as they come, and a file of them is whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pyarrow.parquet
import pytest

from nearkin.cli import rows
from nearkin.cli.rows import write_rows
from nearkin.evaluation.results import Prediction
from nearkin.files import SaveFailed, _Reporting

KINDS = ("csv", "jsonl", "parquet")


def predictions(count: int) -> Iterator[Prediction]:
    for number in range(count):
        yield Prediction(f"{number}.jpg", "cat", 0.5, (("cat", 0.5),), guess="cat")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_not_kept_until_the_last_one(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rows, "GROUP", 1000)
    sizes = []

    def watched() -> Iterator[Prediction]:
        for number, one in enumerate(predictions(9000)):
            if number % 1000 == 0:
                (draft,) = tmp_path.iterdir()
                sizes.append(draft.stat().st_size)
            yield one

    out = tmp_path / f"all.{kind}"
    write_rows(watched(), "run", kind, out)
    assert sizes[1] < sizes[3] < sizes[5] < sizes[7] < out.stat().st_size
    assert list(tmp_path.iterdir()) == [out]
    if kind == "parquet":
        assert pyarrow.parquet.ParquetFile(out).num_row_groups == 9
        assert pyarrow.parquet.read_table(out)["path"].to_pylist()[-1] == "8999.jpg"


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_leaves_the_file_of_before(tmp_path, kind):
    def interrupted() -> Iterator[Prediction]:
        yield from predictions(20_000)
        raise KeyboardInterrupt

    out = tmp_path / f"all.{kind}"
    out.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_rows(interrupted(), "run", kind, out)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, kind):
    """The system's own error, by a file that is opened in place of the draft."""
    real = _Reporting.__init__

    def full(self, path, failure):
        real(self, path, failure)
        device = os.open("/dev/full", os.O_WRONLY)
        os.dup2(device, self.fileno())
        os.close(device)

    monkeypatch.setattr(_Reporting, "__init__", full)
    with pytest.raises(SaveFailed, match=f"could not be written: {os.strerror(errno.ENOSPC)}"):
        write_rows(predictions(20_000), "run", kind, tmp_path / f"all.{kind}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_images_is_none_of_the_file(tmp_path, kind):
    def failing() -> Iterator[Prediction]:
        yield from predictions(3)
        raise OSError(errno.EMFILE, "too many open files")

    with pytest.raises(OSError, match="too many open files"):
        write_rows(failing(), "run", kind, tmp_path / f"all.{kind}")
    assert list(tmp_path.iterdir()) == []
