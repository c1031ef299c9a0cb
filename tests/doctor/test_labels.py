"""The labels that the verb reports, with pixels and with the network of a run."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from nearkin.cli import run
from nearkin.data.sources.resolve import resolve


def doctor(*words):
    return run(["doctor", *map(str, words), "--no-forecast", "--device", "cpu"])


def test_nothing_is_wrong_with_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert doctor("digits", "--strict", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["errors"], record["warnings"]) == (0, 0)
    codes = {"classes", "suspicious-labels", "near-copies"}  # these are too small to be compared
    assert {finding["code"] for finding in record["findings"]} == codes


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Files of digits in a table in which a tenth of the labels are wrong, and which these are."""
    root = tmp_path_factory.mktemp("digits")
    part = resolve("digits").parts["train"]
    rng = np.random.default_rng(0)
    count = 600
    chosen = rng.choice(count, count // 10, replace=False)
    labels = part.labels[:count].copy()
    labels[chosen] = (labels[chosen] + rng.integers(1, 10, len(chosen))) % 10
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        for row in range(count):
            Image.fromarray(part.images.array[row, ..., 0]).save(root / f"{row}.png")
            writer.writerow((f"{row}.png", labels[row]))
    return root / "table.csv", {f"{row}.png" for row in chosen}


def suspicious(folder):
    with (folder / "doctor.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["finding"] == "suspicious-labels"]
    assert all(row["level"] == "warning" for row in rows)
    assert all("of the nearest" in row["detail"] for row in rows)
    return [row["path"].rpartition("/")[2] for row in rows]


def test_wrong_labels_by_pixels(wrong, tmp_path, capsys):
    table, planted = wrong
    assert doctor(table, "--out", tmp_path, "--strict") == 3
    found = suspicious(tmp_path)
    right = sum(name in planted for name in found) / len(found)
    assert right >= 0.9
    assert len(found) >= 0.5 * len(planted)
    assert "labels are suspicious" in capsys.readouterr().out


def test_marked_images_and_contradicting_copies_are_not_suspicious(wrong, tmp_path, capsys):
    """A copy under another label has a finding of its own, and does not vote."""
    table, planted = wrong
    first, second, *rest = sorted(planted)
    text = table.read_text()
    right = next(row for row in csv.reader(text.splitlines()) if row[0] not in {"path", *planted})
    copied = table.with_name("copied.csv")
    (table.parent / "copy.png").write_bytes((table.parent / right[0]).read_bytes())
    copied.write_text(f"{text}copy.png,{(int(right[1]) + 1) % 10}\n")
    marks = tmp_path / "marks.csv"
    marks.write_text(f"path,mark\n{first},leave out\n{second},wrong label\n")
    assert doctor(copied, "--out", tmp_path, "--marks", marks) == 0
    found = set(suspicious(tmp_path))
    assert not found & {first, second, "copy.png", right[0]}
    assert len(found & set(rest)) >= 0.5 * len(rest)
    assert "in two classes or more, as exact copies" in capsys.readouterr().out


def test_wrong_labels_by_the_network_of_a_run(wrong, tmp_path, capsys):
    table, planted = wrong
    words = ["--objective", "ce", "--epochs", "4", "--batch-size", "64", "--threads", "1"]
    words += ["--channels", "1", "--device", "cpu", "--quiet"]
    assert run(["train", "digits", *words, "--out", str(tmp_path / "run")]) == 0
    assert doctor(table, "--out", tmp_path, "--run", tmp_path / "run") == 0
    found = suspicious(tmp_path)
    assert sum(name in planted for name in found) >= 0.9 * len(found)
    assert len(found) >= 0.6 * len(planted)
    assert str(tmp_path / "run") in capsys.readouterr().out
