"""Each image file is opened once, by one process, and what was learned is never taken for more than it is."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from image_files import encoded, folder, noise, write

from nearkin.data import look as look_module
from nearkin.data import remembered
from nearkin.data.dataset import load_dataset
from nearkin.data.decode import BadImage, decoded, inspect
from nearkin.data.images import Files
from nearkin.data.look import BadImages, Ranks, look, usual_side
from nearkin.data.sources.folders import find_images
from nearkin.errors import DataError

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "look.sqlite"


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened, and whether they had to be decoded."""
    calls: list[tuple[str, bool]] = []
    real = inspect

    def counting(path, *, channels, full, least=0):
        calls.append((os.path.basename(path), full))
        return real(path, channels=channels, full=full, least=least)

    monkeypatch.setattr(look_module, "inspect", counting)
    return calls


@pytest.fixture
def data(tmp_path):
    """Twelve good images, and two bad ones in class b."""
    root = folder(tmp_path / "data", a=6, b=6)
    write(root / "b" / "bad.png", encoded(noise(5), "PNG")[:-9])
    write(root / "b" / "empty.jpg", b"")
    return root


def sources(root) -> dict[str, Files]:
    return {"train": Files(find_images(str(root)).files)}


def reasons(root, check="auto", **options) -> dict[str, str]:
    """What is wrong, by the name of the file."""
    return named(look(sources(root), check, **options).bad)


def named(bad: dict[bytes, str]) -> dict[str, str]:
    return {os.path.basename(os.fsdecode(path)): reason for path, reason in bad.items()}


BAD = {"bad.png": "it is truncated", "empty.jpg": "it is empty"}
AGAIN = [(name, True) for name in BAD]  # what a second look opens


def test_a_second_look_opens_what_was_bad_only(data, opened):
    assert reasons(data) == BAD
    assert len(opened) == 14
    for check in ("auto", "full", "headers"):
        opened.clear()
        assert reasons(data, check) == BAD
        assert sorted(opened) == AGAIN


def test_an_image_is_not_bad_for_ever_when_the_memory_ran_out(data, monkeypatch):
    """Pillow says so as of damage: `broken data stream when reading image file`."""
    real = look_module.inspect

    def starved(path, **options):
        raise BadImage(path, "it is damaged (broken data stream)") from OSError("broken data")

    monkeypatch.setattr(look_module, "inspect", starved)
    assert len(look(sources(data), "full").bad) == 14
    monkeypatch.setattr(look_module, "inspect", real)
    assert reasons(data) == BAD
    assert usual_side(sources(data)["train"]) == 8


def test_files_are_named_by_their_absolute_paths(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    for _ in range(2):
        bad = look(sources("data"), "full").bad
        assert set(bad) == {os.fsencode(data / "b" / name) for name in BAD}


@pytest.mark.parametrize("whole", [True, False])
def test_other_paths_to_a_folder_are_the_same_files(data, opened, monkeypatch, whole):
    look(sources(data), "full")
    monkeypatch.chdir(data.parent)
    look(sources("./data"), "full")
    monkeypatch.chdir(data)
    look(sources("." if whole else "b"), "full")
    assert sorted(opened[14:]) == sorted(AGAIN * 2)


def test_a_step_up_from_a_link_leads_to_the_folder_above_its_target(tmp_path):
    """As the system follows it, and not the text."""
    write(tmp_path / "a" / "photos" / "x" / "0.png", b"no image")
    real = folder(tmp_path / "b" / "photos", x=1)
    (tmp_path / "b" / "sub").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "sub")
    files = sources(tmp_path / "a" / "link" / ".." / "photos")["train"]
    assert os.path.samefile(files.key(0), real / "x" / "000.png")
    assert look({"train": files}, "full").bad == {}


def test_new_and_changed_files_are_looked_at(data, opened):
    look(sources(data), "full")
    opened.clear()
    write(data / "a" / "new.png", encoded(noise(77), "PNG"))
    before = (data / "a" / "001.png").stat()
    write(data / "a" / "001.png", bytes(before.st_size))  # the same size
    os.utime(data / "a" / "001.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    write(data / "b" / "empty.jpg", encoded(noise(1), "JPEG"))
    assert set(reasons(data)) == {"001.png", "bad.png"}
    assert sorted(name for name, _ in opened) == ["001.png", "bad.png", "empty.jpg", "new.png"]
    opened.clear()
    assert set(reasons(data)) == {"001.png", "bad.png"}
    assert sorted(opened) == [("001.png", True), ("bad.png", True)]


def test_a_link_to_another_file_is_another_file(tmp_path, opened):
    root = folder(tmp_path / "data", a=1)
    write(tmp_path / "bad", b"no image")
    link = root / "a" / "link.png"
    link.symlink_to(root / "a" / "000.png")
    assert reasons(root) == {}
    link.unlink()
    link.symlink_to(tmp_path / "bad")
    assert set(reasons(root)) == {"link.png"}


def test_headers_are_enough_until_full_is_asked_for(data, opened):
    assert reasons(data, "headers") == BAD
    assert not any(full for _, full in opened)
    reasons(data, "auto")
    assert sorted(opened[14:]) == AGAIN
    assert reasons(data, "full") == BAD
    good = [(f"{n:03}.png", True) for n in (*range(6), *range(6))]
    assert sorted(opened[16:]) == sorted(good + AGAIN)


def test_auto_decodes_few_files_and_says_so_when_they_are_many(data, opened, monkeypatch):
    monkeypatch.setattr(look_module, "MOST_DECODED", 13)
    found = look(sources(data), "auto")
    assert not any(full for _, full in opened)
    assert found.notes[0].startswith("of 14 new images only the header")
    assert "--check full" in found.notes[0]
    assert look(sources(data), "auto").notes == ()
    write(data / "a" / "new.png", encoded(noise(77), "PNG"))
    opened.clear()
    look(sources(data), "auto")
    assert sorted(opened) == [*AGAIN, ("new.png", True)]


def test_only_images_that_are_used_are_looked_at(tmp_path, opened):
    folder(tmp_path / "data", a=30, b=30)
    dataset = load_dataset(str(tmp_path / "data"), images_per_class=4, val_split=0.1)
    assert len(opened) == sum(len(split.labels) for split in dataset.splits.values()) == 8 + 6


def test_the_usual_side_needs_no_pixels(tmp_path, opened, monkeypatch):
    for number in range(5):
        image = encoded(noise(number, 20 + number, 60), "JPEG")
        write(tmp_path / "data" / "a" / f"{number}.jpg", image)
    write(tmp_path / "data" / "a" / "bad.jpg", b"no image")
    (files,) = sources(tmp_path / "data").values()
    monkeypatch.setattr(Files, "read", None)
    assert usual_side(files) == 22
    assert not any(full for _, full in opened)
    look({"train": files}, "full")
    opened.clear()
    assert usual_side(files) == 22
    assert [name for name, _ in opened] == ["bad.jpg"]


def test_without_a_readable_image_there_is_no_usual_side(tmp_path):
    write(tmp_path / "a" / "x.jpg", b"no image")
    with pytest.raises(DataError, match="None of the 1 images can be read"):
        usual_side(sources(tmp_path)["train"])


def damaged_files() -> list[bytes]:
    """Whole, cut, padded and flipped files of all kinds."""
    draw = np.random.default_rng(0)
    found = [b"", b"text", b"\xff\xd8"]
    for kind in KINDS:
        whole = encoded(noise(0, 40, 30), kind)
        found += [whole, whole + b"\0" * 9, whole + b"rubbish"]
        found += [whole[:-1], whole[:-2], whole[:-30], whole[: len(whole) // 2], whole[:40]]
        for _ in range(20):
            flipped = bytearray(whole)
            flipped[draw.integers(min(60, len(whole)))] = draw.integers(256)
            found.append(bytes(flipped))
    return found


def test_headers_refuse_nothing_that_decoding_accepts_and_for_the_same_reason(tmp_path):
    path, missed = tmp_path / "x", 0
    for content in damaged_files():
        write(path, content)
        outcomes = []
        for full in (True, False):
            try:
                outcomes.append(inspect(path, channels=3, full=full)[1])
            except BadImage as error:
                outcomes.append(error.reason)
        if isinstance(outcomes[1], str):
            assert outcomes[0] == outcomes[1]
        elif isinstance(outcomes[0], str):
            missed += 1
        else:
            assert outcomes[0][:3] == outcomes[1][:3]  # the rest is known of decoded images only
    assert missed < 30  # flipped bytes inside; what is cut is found, as below


@pytest.mark.parametrize("kind", KINDS)
def test_headers_find_what_is_cut(tmp_path, kind):
    whole = encoded(noise(0, 40, 30), kind)
    for missing in (2, 30, len(whole) // 2):
        write(tmp_path / "x", whole[:-missing])
        try:
            decoded(tmp_path / "x", channels=3)
        except BadImage:
            with pytest.raises(BadImage):
                inspect(tmp_path / "x", channels=3, full=False)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"AVIF"}))
def test_headers_of_whole_files_need_no_decoding(tmp_path, kind, monkeypatch):
    write(tmp_path / "x", encoded(noise(0, 40, 30), kind))
    monkeypatch.setattr("nearkin.data.decode._decode", None)
    image, header = inspect(tmp_path / "x", channels=3, full=False)
    assert image is None
    assert header[:2] == (30, 40)


def test_errors_of_the_system_are_not_remembered(data, monkeypatch):
    real = look_module.inspect
    denied = BadImage("x", "permission denied")
    denied.__cause__ = PermissionError(13, "Permission denied")

    def failing(path, **options):
        if path.endswith("000.png"):
            raise denied
        return real(path, **options)

    monkeypatch.setattr(look_module, "inspect", failing)
    assert reasons(data)["000.png"] == "permission denied"
    monkeypatch.setattr(look_module, "inspect", real)
    assert reasons(data) == BAD


class Node:
    """Ranks as threads of this process."""

    def __init__(self, size: int) -> None:
        self._barrier, self._values = threading.Barrier(size, timeout=30), [None] * size
        self.size = size

    def rank(self, number: int) -> Ranks:
        def exchange(value):
            self._values[number] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return Ranks(number, self.size, exchange)

    def run(self, work) -> list:
        """What `work(ranks)` returns or raises on each rank."""
        results: list = [None] * self.size

        def guarded(number):
            try:
                results[number] = work(self.rank(number))
            except DataError as error:
                results[number] = error

        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_share_the_files_and_all_learn_the_result(tmp_path, opened, monkeypatch):
    root = folder(tmp_path / "data", a=70, b=50)
    for name in ("a/003.png", "b/049.png"):
        write(root / name, b"no image")
    alone = look(sources(root), "full").bad
    (tmp_path / "cache" / "look.sqlite").unlink()
    opened.clear()
    found = Node(2).run(lambda ranks: look(sources(root), "full", ranks=ranks).bad)
    assert found == [alone] * 2
    assert len(opened) == 120, "each file is opened by one rank"
    opened.clear()
    assert Node(3).run(lambda ranks: list(look(sources(root), "full", ranks=ranks).bad))
    assert len(opened) == 2, "what was bad is opened by one rank"


def test_ranks_decide_together_how_closely_to_look(tmp_path, opened, monkeypatch):
    root = folder(tmp_path / "data", a=40)
    monkeypatch.setattr(look_module, "MOST_DECODED", 30)  # more than each rank has, fewer than all
    Node(2).run(lambda ranks: look(sources(root), "auto", ranks=ranks))
    assert len(opened) == 40
    assert not any(full for _, full in opened)


def test_an_error_on_one_rank_is_raised_on_all(data, monkeypatch):
    real = look_module._learn

    def failing(new, *rest):
        if new:  # on one of the ranks
            raise DataError("the disk is gone")
        return real(new, *rest)

    monkeypatch.setattr(look_module, "_learn", failing)
    found = Node(2).run(lambda ranks: look(sources(data), "full", ranks=ranks))
    assert [str(error) for error in found] == ["the disk is gone"] * 2


def test_ranks_that_see_other_files_are_an_error(data, tmp_path):
    fewer = folder(tmp_path / "fewer", a=3)
    roots = data, fewer
    found = Node(2).run(lambda ranks: look(sources(roots[ranks.rank]), "full", ranks=ranks))
    assert all("see different files" in str(error) for error in found)


PROGRAM = """
import json, sys
from nearkin.data.images import Files
from nearkin.data import look as module
from nearkin.data.sources.folders import find_images
{before}
found = module.look({{"train": Files(find_images({root!r}).files)}}, "full")
bad = {{path.decode().split("/")[-1]: reason for path, reason in found.bad.items()}}
print(json.dumps([bad, found.notes]))
"""


def start(root, before="") -> subprocess.Popen:
    program = PROGRAM.format(root=str(root), before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)


def finish(process) -> tuple[dict[str, str], list[str]]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    bad, notes = json.loads(out)
    return bad, notes


def test_processes_that_write_at_once_lose_nothing(tmp_path, store, opened, monkeypatch):
    roots = [folder(tmp_path / f"data{n}", a=150) for n in range(4)]
    for root in roots:
        write(root / "a" / "bad.png", b"no image")
    small = "from nearkin.data import remembered; remembered.BATCH = 3"  # many transactions
    for process in [start(root, small) for root in roots]:
        bad, notes = finish(process)
        assert set(bad) == {"bad.png"}
        assert notes == []
    for root in roots:
        assert set(reasons(root)) == {"bad.png"}
    assert opened == [("bad.png", True)] * len(roots)
    with sqlite3.connect(store) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(5000), b""])
def test_a_damaged_store_is_replaced(data, store, opened, content):
    look(sources(data), "full")
    store.write_bytes(content)
    opened.clear()
    found = look(sources(data), "full")
    assert len(found.bad) == 2
    assert len(opened) == 14
    assert len(found.notes) == (content != b"")
    assert all("was damaged" in note for note in found.notes)
    look(sources(data), "full")
    opened.clear()
    assert look(sources(data), "full").notes == ()
    assert reasons(data) == BAD
    assert sorted(opened) == sorted(AGAIN * 2)


def test_flipped_bits_of_the_store_never_change_the_result(data, store):
    look(sources(data), "full")
    whole = store.read_bytes()
    draw = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    for _ in range(150):
        content = bytearray(whole)
        for place in draw.choice(used, 3):
            content[place] ^= 1 << draw.integers(8)
        store.write_bytes(bytes(content))
        found = look(sources(data), "full")
        assert named(found.bad) == BAD
        assert len(found.notes) <= 1


def test_another_decoder_looks_again(data, opened, monkeypatch):
    look(sources(data), "full")
    monkeypatch.setattr(
        remembered, "decoder", lambda: b"1 JPEG"
    )  # as before pillow-heif was installed
    look(sources(data), "full")
    assert len(opened) == 28


def test_a_cache_folder_that_cannot_be_made_costs_time_only(data, tmp_path, opened, monkeypatch):
    write(tmp_path / "file", b"")
    monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "file" / "below"))
    for _ in range(2):
        found = look(sources(data), "full")
        assert len(found.bad) == 2
        assert len(found.notes) == 1
        assert "NEARKIN_CACHE_DIR" in found.notes[0]
    assert len(opened) == 28


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("filled", [True, False])
def test_a_store_that_is_read_only_is_read(data, store, tmp_path, opened, monkeypatch, filled):
    for part in (data, *data.parents):
        part.chmod(part.stat().st_mode | 0o055)
        if part.name.startswith("pytest-of-"):
            break
    look(sources(data), "full")
    if not filled:
        monkeypatch.setenv("NEARKIN_CACHE_DIR", str(tmp_path / "other"))
        (tmp_path / "other").mkdir()
    opened.clear()
    os.seteuid(65534)
    try:
        found = look(sources(data), "full")
    finally:
        os.seteuid(0)
    assert len(found.bad) == 2
    assert len(opened) == (len(AGAIN) if filled else 14)
    assert len(found.notes) == (not filled)


def test_a_full_disk_costs_time_only(data, store):
    look(sources(data), "full")
    rows = store.stat().st_size
    for number in range(200):
        write(data / "a" / f"more{number}.png", encoded(noise(number), "PNG"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({rows}, {rows}))"
    bad, notes = finish(start(data, limit))
    assert bad == BAD
    assert len(notes) == 1
    assert "cannot be used" in notes[0]
    assert reasons(data) == BAD


def test_a_store_that_another_process_keeps_locked(data, store, monkeypatch):
    look(sources(data), "full")
    monkeypatch.setattr(remembered, "PATIENCE", 0.05)
    write(data / "a" / "new.png", b"no image")
    with sqlite3.connect(store, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = look(sources(data), "full")
    other.close()
    assert len(found.bad) == 3
    assert len(found.notes) == 1
    assert "locked" in found.notes[0]


# A shell's background jobs ignore SIGINT, and so do their children, unless they ask for it.
SLOW = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def slow(path, **options):
    os.write(1, b"looking\\n")  # in one call: two threads' prints may share a line
    time.sleep(0.5)
    raise module.BadImage(path, "slow")
module.inspect = slow
"""


@pytest.mark.timeout(120)
def test_ctrl_c_ends_a_look_at_once(tmp_path):
    """400 files of half a second each in two threads: only a look that stops early ends in time."""
    process = start(folder(tmp_path / "data", a=400), SLOW)
    try:
        assert process.stdout.readline() == "looking\n"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_while_results_are_taken_in_ends_the_threads(tmp_path, monkeypatch):
    """Though the traceback, which is kept here as it is until the end of a process, still holds their frames."""
    seen = []

    def slow(path, **options):
        seen.append(path)
        time.sleep(0.02)
        raise look_module.BadImage(path, "slow")

    def interrupted(*_):
        raise KeyboardInterrupt

    own = look_module.in_threads
    monkeypatch.setattr(look_module, "inspect", slow)
    monkeypatch.setattr(look_module, "in_threads", lambda *given: own(*given, 2))
    monkeypatch.setattr(look_module.Remembered, "keep", interrupted)
    files = folder(tmp_path / "data", a=400)
    with pytest.raises(KeyboardInterrupt) as held:
        look(sources(files), "full")
    ended = len(seen)
    time.sleep(0.5)
    assert len(seen) <= ended + 4 < 100
    assert held.value is not None


@pytest.mark.parametrize("quiet", [True, False])
def test_a_look_that_takes_long_is_shown_on_stderr(data, capsys, monkeypatch, quiet):
    monkeypatch.setattr(look_module, "QUIET_SECONDS", -1.0)
    look(sources(data), "full", quiet=quiet)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("14 images looked at" in shown.err) == (not quiet)


def test_a_bar_in_a_terminal_tells_files_per_second(data, capsys, monkeypatch):
    monkeypatch.setattr(look_module, "QUIET_SECONDS", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    look(sources(data), "full", quiet=False)
    assert "files/s" in capsys.readouterr().err


def test_the_error_names_the_first_and_counts_all(data):
    with pytest.raises(BadImages, match=r"2 of 14 images cannot be read: .*bad\.png \(it is trunc"):
        load_dataset(str(data), val_split=0)
