"""The order of the confusion matrix, and which classes it shows."""

from __future__ import annotations

import numpy as np

from nearkin.report.matrix import MOST, counts, matrix, most_confused, ordered

CLASSES = ["a", "b", "c", "d", "e", "f"]


def confused(*pairs, classes=CLASSES, hits=20):
    return [(name, name, hits) for name in classes] + list(pairs)


def test_confused_classes_stand_together():
    found = counts(confused(("a", "f", 9), ("f", "a", 5), ("c", "e", 7), ("e", "c", 7)), CLASSES)
    order = ordered(found)
    assert sorted(order) == list(range(6))
    place = {CLASSES[number]: where for where, number in enumerate(order)}
    assert abs(place["a"] - place["f"]) == 1
    assert abs(place["c"] - place["e"]) == 1


def test_without_confusion_the_order_stays():
    assert ordered(counts(confused(), CLASSES)) == list(range(6))
    assert ordered(np.array([[3, 1], [0, 2]])) == [0, 1]


def test_of_many_classes_the_most_confused():
    classes = [f"class {k}" for k in range(120)]
    pairs = [(classes[k], classes[119 - k], 50 - k) for k in range(40)]
    found = most_confused(confused(*pairs, classes=classes), classes)
    assert found == classes[: MOST // 2] + classes[120 - MOST // 2 :]
    drawn = matrix(confused(*pairs, classes=classes), classes)
    assert len(drawn.names) == MOST
    assert drawn.total == 120


def test_of_many_classes_without_errors_some_are_shown():
    classes = [f"class {k}" for k in range(40)]
    found = matrix([(name, name, 3) for name in classes], classes)
    assert (len(found.names), found.total) == (24, 40)


def test_cells_say_what_they_count():
    drawn = matrix(confused(("a", "b", 5), ("b", "a", 1)), CLASSES)
    cells = {cell["pair"]: cell for row in drawn.rows for cell in row["cells"]}
    assert len(cells) == 36
    assert cells["0,1"]["words"] == "a taken for b: 5 images"
    assert cells["0,1"]["share"] == "0.200"
    assert cells["1,0"]["words"] == "b taken for a: 1 image"
    assert cells["0,0"]["words"] == "a recognised: 20 images"
    assert cells["2,3"]["count"] == 0
    assert [row["name"] for row in drawn.rows] == drawn.names
