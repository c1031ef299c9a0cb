"""The look at image files before training: the first and a later start, and how lists grow with the number of files."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.bench import Call, Row, Table, alternate, fastest, ratio
from nearkin.data import threads
from nearkin.data.dataset import sizes_of
from nearkin.data.decode import decoded, quiet_pillow
from nearkin.data.images import Files
from nearkin.data.look import Check, look
from nearkin.data.remembered import STORE
from nearkin.data.sources.folders import list_folder
from nearkin.data.sources.listing import FileList
from nearkin.files import CACHE

FILES = int(os.environ.get("NEARKIN_BENCH_FILES", "20000"))
LARGE = FILES // 10
LISTED = int(os.environ.get("NEARKIN_BENCH_LISTED", "1000000"))
IMAGENET = 1_281_167
RUNS = 3
ANSWER = 0.0003  # seconds


def photographs(root: Path, count: int, width: int, height: int) -> Path:
    """JPEGs in ten classes: random parts of a photograph that comes with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo, draw = Image.fromarray(load_sample_image("china.jpg")), np.random.default_rng(0)
    for number in range(count):
        left, top = draw.integers(640 - 160, size=2) // (1, 2)
        path = root / f"n{number % 10:08}" / f"n{number % 10:08}_{number:06}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = photo.crop((left, top, left + 160, top + 120)).resize((width, height))
        part.save(path, quality=90)
    return root


@contextmanager
def remembered_in(folder: Path) -> Iterator[Path]:
    """The store of what is known lies in `folder`."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder)
    try:
        yield folder / STORE
    finally:
        if before is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = before


def on_all_cores(work: Callable[[str], object], paths: list[str]) -> None:
    """`work` for each path, in a thread for each core."""

    def some(start: int) -> None:
        for path in paths[start : start + 64]:
            work(path)

    with quiet_pillow, ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, len(paths), 64)))


def verified(path: str) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.verify()


def listed(root: Path) -> Files:
    images = list_folder(str(root)).parts["train"].images
    assert isinstance(images, FileList)
    return Files(images)


def starts(root: Path, store: Path, what: str) -> list[Row]:
    """A first and a later start on the images of `root` beside other passes over them."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    def start(check: Check = "full") -> None:
        look({"train": listed(root)}, check)

    def first() -> None:
        store.unlink(missing_ok=True)
        start()

    def headers() -> None:
        store.unlink(missing_ok=True)
        start("headers")

    paths = list(listed(root).files)
    seconds = alternate(
        {
            "headers": headers,
            "first": first,
            "later": start,
            "decode": lambda: on_all_cores(lambda path: decoded(path, 3), paths),
            "verify": lambda: on_all_cores(verified, paths),
            "timm": lambda: ReaderImageFolder(str(root)),  # type: ignore[no-untyped-call]
        },
        RUNS,
    )
    return [
        ratio(seconds, "first", "decode", f"{what}: first start / one decode of each file", 1.1),
        ratio(seconds, "first", "verify", f"{what}: first start / Pillow's verify of each file"),
        ratio(seconds, "headers", "verify", f"{what}: headers only / Pillow's verify"),
        fastest(seconds, "later", f"{what}: later start", 1.5),
        ratio(seconds, "later", "timm", f"{what}: later start / timm's list of the folder"),
    ]


def from_afar(root: Path) -> Row:
    """A later start where each question to the file system takes ANSWER seconds more, as over a network."""
    own = os.stat

    def slow(*given: Any, **options: Any) -> os.stat_result:
        time.sleep(ANSWER)
        return own(*given, **options)

    def asking(count: int) -> None:
        with mock.patch.object(os, "stat", slow), mock.patch.object(threads, "ASKING", count):
            look({"train": listed(root)}, "auto")
            sizes_of(list_folder(str(root)))

    usual = threads.ASKING
    calls: dict[str, Call] = {"one": lambda: asking(1), "several": lambda: asking(usual)}
    what = f"{FILES} files, {1000 * ANSWER:g} ms an answer: {usual} questions at once / one"
    return ratio(alternate(calls, RUNS), "several", "one", what)


def listings(root: Path) -> list[Row]:
    """Listing of empty files, and what ImageNet takes at the same speed."""
    for number in range(LISTED):
        folder = root / f"n{number % 1000:08}"
        if number < 1000:
            folder.mkdir(parents=True)
        os.close(os.open(folder / f"n{number % 1000:08}_{number:07}.JPEG", os.O_CREAT))
    seconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        part = list_folder(str(root)).parts["train"]
        seconds.append(time.perf_counter() - begun)
    del part
    tracemalloc.start()
    part = list_folder(str(root)).parts["train"]
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    best, median = min(seconds), statistics.median(seconds)
    share = IMAGENET / len(part.images)
    return [
        Row(f"list {LISTED} files", best, median, None, False, "s", ours=best, runs=RUNS),
        Row("the same for ImageNet, by arithmetic", best * share, None, None, False, "s"),
        Row("memory kept per listed file", kept / LISTED, None, 400.0, False, "bytes"),
        Row("memory at the peak of listing, per file", peak / LISTED, None, 400.0, False, "bytes"),
    ]


def table() -> Table:
    with tempfile.TemporaryDirectory() as place, remembered_in(Path(place) / "cache") as store:
        root = Path(place)
        small = photographs(root / "small", FILES, 160, 120)
        rows = starts(small, store, f"{FILES} JPEGs of 160 x 120")
        rows.append(from_afar(small))
        large = photographs(root / "large", LARGE, 500, 375)
        rows += starts(large, store, f"{LARGE} JPEGs of 500 x 375")
        rows += listings(root / "empty")
    return Table("Look at the images", "in one process, files in the page cache", rows)
