"""The page of a run: what is in it, that names cannot break it, and that it stays small and needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from tests.comparison.test_page import Page, pictures
from tests.report.reports import HOSTILE, facts, hostile, many_classes, report_data, small

from nearkin.report.run import run_page


def page(data, **changes):
    return run_page(data, facts(data)._replace(**changes))


def embedded(text):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


def test_what_is_said_first():
    found = Page(page(small()))
    assert found.texts("h1") == ["80.0 % of the test images are recognised"]
    assert "+15.0 points" in found.texts("strong")
    assert any("8 errors" in text for text in found.texts("p"))
    for part in (
        "Look here first",
        "Map of the embedding",
        "Confused classes",
        "How it was trained",
    ):
        assert part in found.texts("h2")


def test_the_data_of_the_script():
    data = small()
    values = embedded(page(data))
    count = len(data.images.names)
    names = [
        values["folders"][f] + b for f, b in zip(values["folder"], values["base"], strict=True)
    ]
    assert names == list(data.images.names)
    assert values["label"] == data.images.labels.tolist()
    assert values["predicted"] == data.images.predicted[:40].tolist()
    assert len(values["pca"]) == 2 * count
    assert len(values["kin"]) == len(values["weight"]) == 10 * len(values["withKin"])
    assert np.array(values["weight"]) / 10_000 == pytest.approx(data.kin.weight.ravel(), abs=1e-4)
    label, share, without = values["votes"][0][:3]
    assert (label, share / 1000) == pytest.approx(data.kin.votes[0][0][:2], abs=1e-3)
    assert without / 1000 == pytest.approx(data.kin.votes[0][0].without, abs=1e-3)
    assert values["tsne"] is None


def test_hostile_names_are_text_everywhere():
    data = hostile()
    given = facts(data, run=HOSTILE)._replace(
        options={"data": HOSTILE, HOSTILE: HOSTILE},
        environment={"command": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        lines=(
            {"kind": "train", "step": 1, HOSTILE: 1.0},
            {"kind": "train", "step": 2, HOSTILE: 2.0},
        ),
    )
    text = run_page(data, given)
    plain = Page(page(small()))
    found = Page(text)
    assert {tag for tag, _, _ in found.elements} <= {tag for tag, _, _ in plain.elements}
    assert text.count("<script") == text.count("</script") == 2
    assert "<img" not in text
    assert "<!--" not in text
    assert not set(text) & {"\u202e", "\x1b"}
    assert "{{7*7}}" in text
    text.encode("utf-8")
    values = embedded(text)
    assert values["raw"]["0"] == data.images.names[0]  # exactly, for the marks
    assert values["rawClasses"]["0"] == data.classes[0]
    assert values["classes"][0].isprintable()


def test_nothing_comes_from_elsewhere():
    text = page(small())
    found = Page(text)
    tags = {tag for tag, _, _ in found.elements}
    assert not tags & {"link", "img", "iframe", "object", "form", "base"}
    names = {name for _, attributes, _ in found.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src"}
    assert all(a["href"].startswith("#") for _, a, _ in found.elements if "href" in a)
    assert set(re.findall(r"https?://[^\"<> ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"url\((.{18})", text)) == {'"data:image/webp;b'}
    assert "@import" not in text


def test_only_the_script_of_the_page_may_run():
    text = page(small())
    policy = next(a["content"] for _, a, _ in Page(text).elements if "http-equiv" in a)
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "</" not in script.replace("</script>", "")


def test_every_link_and_identifier():
    for data in (small(), many_classes()):
        found = Page(page(data))
        identifiers = [a["id"] for _, a, _ in found.elements if "id" in a]
        assert len(identifiers) == len(set(identifiers))
        assert {a["href"][1:] for _, a, _ in found.elements if "href" in a} <= set(identifiers)
        levels = [int(tag[1]) for tag, _, _ in found.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert all("scope" in a for tag, a, _ in found.elements if tag == "th")


def test_pictures_are_described():
    for drawn in pictures(page(small())):
        assert [child.tag.split("}")[1] for child in list(drawn)[:2]] == ["title", "desc"]
        assert all(child.text for child in list(drawn)[:2])


def test_a_run_without_much():
    data = report_data(
        2, 2, classes=("a", "b"), errors=0, flipped=0, temperature=None, neighbours=1
    )
    given = facts(data, before=False)._replace(lines=(), environment={}, options={}, right={})
    found = Page(run_page(data, given))
    assert found.texts("h1") == ["100.0 % of the test images are recognised"]
    assert not any(tag == "h3" and a.get("id") == "worst" for tag, a, _ in found.elements)


def test_ten_thousand_images_stay_below_six_megabytes():
    rng = np.random.default_rng(0)
    classes = [f"a class of things with number {k:03}" for k in range(100)]
    data = report_data(
        10_000,
        12_000,
        classes,
        names="photos of a holiday/{}/DSC_{:08}_été.jpeg",
        pictures=50,
        neighbours=50,
    )
    assert data.images.evaluated == 10_000
    # The sprite keeps its own limit; one of that size stands for it.
    largest = replace(data, sprite=data.sprite._replace(data=rng.bytes(2_400_000)))
    size = len(page(largest).encode())
    assert 3_200_000 < size < 6_000_000


def test_the_same_run_gives_the_same_page():
    assert page(report_data()) == page(report_data())
