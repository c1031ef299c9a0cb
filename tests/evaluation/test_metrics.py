"""Metrics against loops written from their definitions, closed forms, and tables read back."""

from __future__ import annotations

import csv
import json
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nearkin.errors import DataError, DivergedError
from nearkin.evaluation.metrics import reduced, summarise, write_predictions, write_tables
from nearkin.evaluation.results import Metrics, wilson


class Given(NamedTuple):
    """What a model computes of a split."""

    probabilities: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]


def predictions(probabilities: Any, labels: Any) -> Given:
    return Given(
        torch.as_tensor(probabilities, dtype=torch.float32),
        torch.as_tensor(labels),
        torch.arange(len(labels)),
    )


def summary_of(given: Given, classes: Sequence[str]) -> Metrics:
    return summarise(reduced(*given), classes)


def letters(count: int) -> list[str]:
    return [chr(ord("a") + number) for number in range(count)]


def drawn(images: int, classes: int, seed: int) -> Given:
    """Confident, hesitant and tied rows, about half of them right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) * 2
    logits[::2].scatter_add_(1, labels[::2, None], torch.full((len(labels[::2]), 1), 2.0))
    logits[::7] = logits[::7].round()
    return predictions(logits.softmax(1), labels)


def oracle(given: Given, classes: int) -> dict[str, Any]:
    """The definitions, image after image and class after class."""
    rows, labels = given.probabilities.double().tolist(), given.labels.tolist()
    n = len(labels)
    hits1 = hits5 = 0
    loss = 0.0
    predicted = []
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(rows, labels, strict=True):
        ranking = sorted(range(classes), key=lambda c: (-row[c], c))
        predicted.append(ranking[0])
        hits1 += ranking[0] == label
        hits5 += label in ranking[:5]
        loss -= math.log(max(row[label], 1e-12))
        for number in range(15):
            if number / 15 < max(row) <= (number + 1) / 15:
                bins[number].append((max(row), ranking[0] == label))
    assert sum(map(len, bins)) == n
    ece = sum(
        len(b) / n * abs(sum(hit for _, hit in b) / len(b) - sum(p for p, _ in b) / len(b))
        for b in bins
        if b
    )
    table = []
    for c in range(classes):
        both = sum(p == c == y for p, y in zip(predicted, labels, strict=True))
        said, true = predicted.count(c), labels.count(c)
        precision, recall = both / said if said else 0.0, both / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        table.append((precision, recall, f1, true))
    seen = [line for line in table if line[3]]
    macro = [sum(line[i] for line in seen) / len(seen) for i in range(3)]
    pairs = list(zip(labels, predicted, strict=True))
    confusion = [[pairs.count((y, p)) for p in range(classes)] for y in range(classes)]
    return {
        "n": n,
        "top1": hits1 / n,
        "top5": hits5 / n,
        "log_loss": loss / n,
        "ece": ece,
        "macro": macro,
        "table": table,
        "confusion": confusion,
    }


def dense(metrics: Metrics) -> list[list[int]]:
    """The confusion matrix with its zeros."""
    names = [row.name for row in metrics.per_class]
    matrix = [[0] * len(names) for _ in names]
    for true, predicted, images in metrics.confusion:
        assert images > 0
        assert matrix[names.index(true)][names.index(predicted)] == 0, "one row for each cell"
        matrix[names.index(true)][names.index(predicted)] = images
    return matrix


def assert_matches(given: Given, classes: int) -> None:
    actual, expected = summary_of(given, letters(classes)), oracle(given, classes)
    assert actual.n == expected["n"]
    assert dense(actual) == expected["confusion"]
    for name in ("top1", "top5", "log_loss", "ece"):
        assert getattr(actual, name) == pytest.approx(expected[name], rel=1e-12, abs=1e-15), name
    assert list(actual.macro) == pytest.approx(expected["macro"], rel=1e-12)
    for name, line, values in zip(
        letters(classes), actual.per_class, expected["table"], strict=True
    ):
        assert line.name == name
        assert line.support == values[3]
        assert list(line[1:4]) == pytest.approx(values[:3], rel=1e-12)
    assert actual.interval == wilson(expected["top1"], expected["n"])
    wrong = [
        (images, -true, -said)
        for true, row in enumerate(expected["confusion"])
        for said, images in enumerate(row)
        if images and true != said
    ]
    images, true, said = max(wrong, default=(0, 0, 0))
    names = letters(classes)
    assert actual.worst == ((names[-true], names[-said], images) if wrong else None)
    assert json.loads(json.dumps(actual.totals(), allow_nan=False)) == actual.totals()
    assert set(actual.totals()) == {
        *("n", "top1", "interval", "top5", "log_loss", "ece", "macro", "most_confused")
    }


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 7, 23])
@pytest.mark.parametrize("images", [1, 2, 101, 256])
def test_equal_to_the_loops(images: int, classes: int) -> None:
    for seed in range(3):
        assert_matches(drawn(images, classes, seed), classes)


@pytest.mark.parametrize("classes", [2, 7])
def test_equal_to_scikit_learn(classes: int) -> None:
    from sklearn import metrics

    given = drawn(501, classes, seed=9)
    labels, predicted = given.labels.numpy(), given.probabilities.numpy().argmax(1)
    actual = summary_of(given, letters(classes))
    assert actual.top1 == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert dense(actual) == metrics.confusion_matrix(labels, predicted).tolist()
    exact = given.probabilities.double()
    exact /= exact.sum(1, keepdim=True)
    assert actual.log_loss == pytest.approx(metrics.log_loss(labels, exact.numpy()), rel=1e-6)


def test_top5_is_one_up_to_five_classes_and_exact_above() -> None:
    assert all(summary_of(drawn(50, c, seed=0), letters(c)).top5 == 1 for c in range(2, 6))
    rows = [[0.3, 0.25, 0.2, 0.15, 0.09, 0.01]] * 2
    assert summary_of(predictions(rows, [4, 5]), letters(6)).top5 == 0.5


def test_of_equally_probable_classes_the_lower_number_comes_first() -> None:
    uniform = predictions(torch.full((7, 7), 1 / 7), range(7))
    summary = summary_of(uniform, letters(7))
    assert summary.top1 == 1 / 7
    assert summary.top5 == 5 / 7


def test_closed_forms_of_the_calibration_error() -> None:
    right = predictions([[0.75, 0.25]] * 4, [0, 0, 0, 1])
    assert summary_of(right, "ab").ece == 0  # says 0.75 and is right three times of four
    sure = predictions([[1.0, 0.0]] * 4, [0, 1, 1, 1])
    assert summary_of(sure, "ab").ece == 0.75
    # Over- and under-confident halves in two bins do not cancel, in one bin they do.
    two = predictions([[0.875, 0.125]] * 2 + [[0.625, 0.375]] * 2, [1, 1, 0, 0])
    assert summary_of(two, "ab").ece == pytest.approx((0.875 + 0.375) / 2)
    one = predictions([[0.8125, 0.1875]] * 2 + [[0.828125, 0.171875]] * 2, [1, 1, 0, 0])
    assert summary_of(one, "ab").ece == pytest.approx(0.8203125 - 0.5)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    edge = torch.tensor([[0.6, 0.4], [0.59, 0.41], [0.61, 0.39]], dtype=torch.float64)
    given = Given(edge, torch.tensor([0, 1, 0]), torch.arange(3))
    # 0.6 = 9/15: with 0.59 in bin 9, where one of two is right; 0.61 stands alone in bin 10.
    expected = (2 * abs(0.5 - 0.595) + abs(1 - 0.61)) / 3
    assert summary_of(given, "ab").ece == pytest.approx(expected)


def test_log_loss_of_an_impossible_label_is_bounded() -> None:
    assert summary_of(predictions([[1.0, 0.0]], [1]), "ab").log_loss == -math.log(1e-12)
    assert summary_of(predictions([[1.0, 0.0]], [0]), "ab").log_loss == 0
    half = summary_of(predictions([[0.5, 0.5]] * 3, [0, 1, 1]), "ab").log_loss
    assert half == pytest.approx(math.log(2))


def test_an_absent_class_has_no_part_in_the_macro_averages() -> None:
    rows = [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]
    summary = summary_of(predictions(rows, [0, 0, 1, 1]), ["cat", "dog", "gnu"])
    assert summary.per_class[2] == ("gnu", 0.0, 0.0, 0.0, 0)
    assert summary.macro == (1.0, 0.75, pytest.approx((2 / 3 + 1) / 2))


def test_no_images_and_values_that_are_not_finite_are_errors() -> None:
    good = drawn(4, 3, seed=0)
    with pytest.raises(DataError, match="no images"):
        summary_of(predictions(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)), "abc")
    broken = good.probabilities.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(DivergedError, match="1 of 4"):
        summary_of(good._replace(probabilities=broken), "abc")


def test_nothing_grows_with_the_square_of_the_classes(tmp_path: Path) -> None:
    """30 000 classes and 50 images: a dense matrix would have 900 million cells."""
    classes = [f"class {number}" for number in range(30_000)]
    labels = torch.arange(50) * 599
    rows = torch.full((50, 30_000), 0.5 / 29_999)
    rows[torch.arange(50), labels + 1] = 0.5
    tracemalloc.start()
    metrics = summary_of(predictions(rows, labels), classes)
    confusion, table = write_tables(tmp_path, "test", metrics)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert len(metrics.confusion) == 50
    assert metrics.confusion[0] == ("class 0", "class 1", 1)
    assert len(json.dumps(metrics.totals())) < 400
    with confusion.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 50
    assert lines[1] == {"true": "class 599", "predicted": "class 600", "count": "1"}
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 30_000
    assert lines[599] == {
        "class": "class 599",
        "precision": "0.0",
        "recall": "0.0",
        "f1": "0.0",
        "support": "1",
    }


@pytest.mark.parametrize("n", [1, 2, 10, 360, 50_000])
def test_the_ends_of_the_interval_are_where_the_test_of_the_share_just_accepts(n: int) -> None:
    """Wilson's interval holds the shares p with |share - p| <= z sqrt(p (1 - p) / n)."""
    z = 1.959964
    for right in {0, 1, n // 3, n // 2, n - 1, n}:
        share = right / n
        for end in wilson(share, n):
            square = z * z * end * (1 - end) / n
            assert (share - end) ** 2 == pytest.approx(square, rel=1e-9, abs=1e-15)
        low, high = wilson(share, n)
        assert 0 <= low <= share + 1e-12
        assert share - 1e-12 <= high <= 1
        mirrored = [1 - end for end in wilson(1 - share, n)]
        assert [high, low] == pytest.approx(mirrored, abs=1e-12)


def test_known_values_of_the_interval() -> None:
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(1.0, 10) == pytest.approx((0.72246, 1.0), abs=1e-5)
    summary = summary_of(predictions([[0.9, 0.1]] * 2, [0, 1]), "ab")
    assert summary.totals()["interval"] == list(wilson(0.5, 2))


def test_the_two_classes_that_are_confused_most_often() -> None:
    sure = torch.eye(3)
    one = predictions(sure[[0, 0, 0, 1, 2, 1]], [0, 0, 1, 2, 1, 2])
    worst = summary_of(one, ["cat", "dog", "gnu"]).worst
    assert worst == ("gnu", "dog", 2)
    assert summary_of(one, ["cat", "dog", "gnu"]).totals()["most_confused"] == {
        "true": "gnu",
        "predicted": "dog",
        "images": 2,
    }
    right = summary_of(predictions(sure, [0, 1, 2]), ["cat", "dog", "gnu"])
    assert right.worst is None
    assert right.totals()["most_confused"] is None


NAMES = [
    "plain.png",
    'a "b", c.png',
    "new\nline\r\n.png",
    "cr\r.png",
    "\udcff\udc80 ü.png",
    " =1+1 ",
]


def test_the_table_gives_every_text_and_number_back(tmp_path: Path) -> None:
    classes = ["cat, big", 'd"og', "line\nbreak", "\udcfe", "", "ün", "7"]
    given = drawn(len(NAMES), len(classes), seed=1)
    path = tmp_path / "predictions.csv"
    write_predictions(path, reduced(*given), NAMES, classes)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert [row["path"] for row in rows] == NAMES
    assert b"\xff\x80" in path.read_bytes()  # the file's own bytes, not an escape
    for row, label, values in zip(
        rows, given.labels.tolist(), given.probabilities.tolist(), strict=True
    ):
        assert list(row) == [
            "path",
            "label",
            "label_probability",
            "predicted",
            "probability",
            "top5",
        ]
        ranking = sorted(range(7), key=lambda c: (-values[c], c))[:5]
        assert row["label"] == classes[label]
        assert row["predicted"] == classes[ranking[0]]
        assert float(row["probability"]) == values[ranking[0]]
        assert json.loads(row["top5"]) == [[classes[c], values[c]] for c in ranking]


def test_the_table_names_rows_by_index(tmp_path: Path) -> None:
    given = drawn(2, 2, seed=0)._replace(index=torch.tensor([1, 3]))
    path = tmp_path / "predictions.csv"
    write_predictions(path, reduced(*given), ["w", "x", "y", "z"], ["a", "b"])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["x", "z"]
    assert all(len(json.loads(row["top5"])) == 2 for row in rows)
