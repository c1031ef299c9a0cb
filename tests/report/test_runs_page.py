"""The page of several runs."""

from __future__ import annotations

import re

import pytest

from nearkin.report.run import Facts
from nearkin.report.runs import Finished, runs_page

HITS = {("cat/1.jpg", "cat"): True, ("cat/2.jpg", "cat"): False, ("dog/1.jpg", "dog"): True}


def finished(run, hits, *, images=None, root="", lines=()):
    facts = Facts(run, tuple(lines), hits, {"objective": "ce"}, {}, images, root)
    return Finished(facts, {"n": len(hits), "top1": 0.5, "log_loss": 1.0, "split": "test"})


@pytest.mark.parametrize(
    ("images", "roots", "prefix", "common"),
    [
        (("same", "same"), ("/here/photos", "/there/photos"), "", True),  # moved
        (("one", "two"), ("/photos", "/photos"), "", True),  # some were left out
        (("one", "two"), ("/tables/photos", "/tables"), "photos/", True),  # of a table beside them
        (("one", "two"), ("/cats", "/dogs"), "", False),  # other images with these names
        ((None, None), ("/photos", "/photos"), "", True),
    ],
)
def test_images_are_the_same_by_their_data_or_their_path(images, roots, prefix, common):
    first = finished("first", HITS, images=images[0], root=roots[0])
    other = {(prefix + name, label): True for name, label in HITS}
    text = runs_page([first, finished("second", other, images=images[1], root=roots[1])])
    assert ("no evaluated image in common" in text) != common
    assert ("second is not shown to differ from first: +33.3 points" in text) == common


def test_an_image_with_another_label_is_not_the_same():
    relabelled = {(name, "cat"): True for name, _ in HITS}
    text = runs_page([finished("first", HITS), finished("second", relabelled)])
    assert "second is not shown to differ from first on the 2 images that both have: +50.0" in text


def test_the_number_of_compared_images_is_told_where_it_is_not_all():
    other = {("cat/1.jpg", "cat"): True, ("cat/9.jpg", "cat"): False}
    text = runs_page([finished("first", HITS), finished("second", other)])
    assert "differ from first on the 1 image that both have: 0.0 points" in text
    assert ", on the 1 image that both have" in text
    assert "that both have" not in runs_page([finished("first", HITS), finished("second", HITS)])


def test_runs_are_named_without_the_folder_of_all():
    place = "/home/someone/projects/photos/runs"
    found = [finished(f"{place}/photos-20260101-{k}", HITS) for k in (1, 2)]
    text = runs_page(found)
    assert f"2 runs in {place}, compared with photos-20260101-1" in text
    assert text.count(place) == 1
    assert ">photos-20260101-2<" in text


def test_curves_go_on_over_the_stages():
    lines = [
        {"kind": "validation", "stage": stage, "epoch": epoch, "step": step, "top1": step / 100}
        for stage, epoch, step in [("probe", 0, 0), ("a", 0, 10), ("a", 1, 20), ("b", 0, 30)]
    ]
    text = runs_page([finished("first", HITS, lines=lines), finished("second", HITS)])
    points = re.search(r'class="mean s0" points="([^"]*)"', text)[1].split()
    across = [float(point.partition(",")[0]) for point in points]
    assert len(across) == 4
    assert across == sorted(across)
