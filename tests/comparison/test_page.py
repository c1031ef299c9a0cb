"""The page of a comparison: what it says, that names cannot break it, and that it needs nothing from elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from tests.comparison.comparisons import HOSTILE, SHOWN, comparison, contrasts, large, run, small

from nearkin.comparison.page import comparison_page
from nearkin.comparison.results import UNTRAINED, Comparison, Run

NAMESPACE = "{http://www.w3.org/2000/svg}"
EMPTY = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every element with its attributes and text, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in EMPTY:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for place in self.open:
            self.elements[place][2].append(data)

    def texts(self, *tags: str) -> list[str]:
        return [" ".join("".join(text).split()) for tag, _, text in self.elements if tag in tags]


def pictures(text: str) -> list[ElementTree.Element]:
    found = re.findall(r'<svg [^>]*role="img".*?</svg>', text, flags=re.DOTALL)
    return [ElementTree.fromstring(each) for each in found]


def marks(picture: ElementTree.Element) -> list[ElementTree.Element]:
    legend = {id(e) for g in picture.iter() if g.get("class") == "legend" for e in g.iter()}
    return [
        e
        for e in picture.iter()
        if "mark" in (e.get("class") or "").split() and id(e) not in legend
    ]


def headline(given: Comparison) -> str:
    return Page(comparison_page(given)).texts("h1")[0]


def test_the_headline_says_what_is_better():
    page = Page(comparison_page(small()))
    assert page.texts("h1") == [
        "supcon is better than ce by 2.1 points (95 % interval 1.2 to 3.0)."
    ]
    sentences = page.texts("p")
    assert "cone is worse than ce by 1.2 points (95 % interval 0.8 to 1.6)." in sentences
    assert "It is undecided for ce+ema." in sentences
    assert "1 run failed; the errors are below the table of runs." in sentences
    assert "1 run is waiting, so these results can still change." in sentences


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            contrasts("a", 0.001, "the same within 0.5 points"),
            "No objective is shown to be better than ce.",
        ),
        (contrasts("a", -0.01, "worse"), "No objective is shown to be better than ce."),
        (
            contrasts("a", 0.0004, "better", half=0.0003),
            "a is better than ce by 0.04 points (95 % interval 0.01 to 0.07).",
        ),
        ([], "There is no verdict yet: ce and another entry need 3 finished seeds"),
        (
            contrasts("a", 0.2, "no verdict: 3 seeds are the least", seeds=2),
            "There is no verdict yet: ce and another entry need 3 finished seeds",
        ),
    ],
)
def test_the_headline_without_a_clear_winner(found, expected):
    given = comparison([run(name, seed) for name in ("ce", "a") for seed in range(3)], found)
    assert headline(given).startswith(expected)


def test_many_that_are_better_are_named_in_one_sentence():
    sentences = Page(comparison_page(large())).texts("h1", "p")
    better = [text for text in sentences if " better than ce" in text and "points" in text]
    assert [text.split()[0] for text in better] == [
        f"objective-number-{k}:weight=0.{k}" for k in (9, 8, 7)
    ]
    rest = next(text for text in sentences if text.endswith("are better than ce, too."))
    assert rest.count("objective-number") == 6


def test_an_entry_that_trained_no_epoch_is_named():
    found = [*contrasts("a", 0.02, "better"), *contrasts("b", 0.02, UNTRAINED)]
    runs = [run(name, seed) for name in ("ce", "a", "b") for seed in range(3)]
    assert "There is no verdict yet for b." in comparison_page(comparison(runs, found))
    alone = comparison(runs, contrasts("b", 0.02, UNTRAINED))
    assert headline(alone).startswith("There is no verdict yet")
    idle = [replace(each, epochs=0) for each in runs]
    expected = "There is no verdict: runs without an epoch are probes of the same features."
    assert headline(comparison(idle, contrasts("b", 0.02, UNTRAINED))) == expected


def test_an_entry_without_a_verdict_is_named():
    runs = [run(name, seed) for name in ("ce", "a", "b") for seed in range(3)]
    page = comparison_page(comparison(runs, contrasts("a", 0.02, "better")))
    assert "There is no verdict yet for b." in page


@pytest.mark.parametrize("state", ["failed", "waiting"])
def test_a_comparison_without_a_finished_run(state):
    runs = [Run(entry=n, seed=0, folder=f"runs/{n}", state=state) for n in ("ce", "a")]
    page = comparison_page(comparison(runs))
    assert Page(page).texts("h1") == ["Nothing can be said yet: no run of ce is finished."]
    assert pictures(page) == []
    assert ("The run left no message." in page) == (state == "failed")


def test_the_table_has_every_number():
    page = Page(comparison_page(small()))
    rows = [text for text in page.texts("tr") if text.startswith("supcon")]
    for part in ("91.20 ± 0.16", "+2.10", "+1.20 to +3.00", "better", "5 of 5", "90.20", "0.400"):
        assert part in rows[0]
    assert "2000 32.0 512 2.81 M 0" in rows[0]
    failed = [text for text in page.texts("tr") if text.startswith("cone")]
    assert failed[0].endswith(" 1")
    assert failed[4].split()[:3] == ["cone", "3", "failed"]
    assert page.texts("pre") == ["out of memory at step 3"]
    assert len(page.texts("tr")) == 1 + 4 + 1 + 2 + 1 + 20


def test_every_value_has_its_mark():
    time, everything, late = pictures(comparison_page(small()))[3:6]
    assert len(marks(time)) == 18 + 4
    assert [len(e) > 0 for e in marks(time)] == [True] * 22  # a tooltip
    lines = [e.get("class") for e in everything.iter(f"{NAMESPACE}polyline")]
    assert sum(name.startswith("thin") for name in lines) == 18
    assert sum(name.startswith("mean") for name in lines) == 4
    assert late.find(f"{NAMESPACE}title") is not None


def test_the_intervals_are_in_the_order_of_their_values():
    for picture in pictures(comparison_page(small()))[:3]:
        lines = [e for e in picture.iter() if (e.get("class") or "").startswith("interval")]
        cone, ema, supcon = (
            (float(lines[k].get("x1")) + float(lines[k].get("x2"))) / 2 for k in (1, 2, 0)
        )
        assert cone < ema < supcon


def test_classes_are_compared_with_the_baseline():
    found = pictures(comparison_page(small()))[6:]
    assert [len([e for e in p.iter() if "bar" in (e.get("class") or "")]) for p in found] == [2] * 3
    assert len(pictures(comparison_page(large()))[6:]) == 9
    assert "30 of 200 classes" in comparison_page(large())


def test_hostile_names_are_text_everywhere():
    runs = [run(name, seed) for name in (f"ce{HOSTILE}", f"a{HOSTILE}") for seed in range(3)]
    runs.append(Run(entry=runs[0].entry, seed=3, folder=HOSTILE, state="failed", error=HOSTILE))
    found = contrasts(runs[3].entry, 0.02, f"better{HOSTILE}")
    given = comparison(runs, found, classes=[HOSTILE, "cat"], data=HOSTILE, notes=[HOSTILE])
    given = replace(given, equal={HOSTILE: HOSTILE}, picked=(HOSTILE, HOSTILE))
    text = comparison_page(given)
    page = Page(text)
    assert {tag for tag, _, _ in page.elements} == {
        tag for tag, _, _ in Page(comparison_page(small())).elements
    }
    assert SHOWN in text
    assert "<img" not in text
    assert "<script" not in text
    assert not set(text) & {"\u202e", "\x1b"}
    assert "\\u202e" in text
    assert len(pictures(text)) == 6
    text.encode("utf-8")


@pytest.mark.parametrize("make", [small, large])
def test_nothing_comes_from_elsewhere(make):
    text = comparison_page(make())
    page = Page(text)
    assert not {tag for tag, _, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    names = {name for _, attributes, _ in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "style"}
    assert {a["href"] for _, a, _ in page.elements if "href" in a} == {"#reading"}
    assert set(re.findall(r"https?://[^\"<> ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for _, a, _ in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_screen_readers_and_keyboards_find_their_way():
    page = Page(comparison_page(small()))
    assert page.elements[0][:2] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all("scope" in a for tag, a, _ in page.elements if tag == "th")
    regions = [a for _, a, _ in page.elements if a.get("role") == "region"]
    assert len(regions) == 3
    assert all(a["tabindex"] == "0" for a in regions)
    assert len({a["aria-label"] for a in regions}) == 3
    identifiers = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    for picture in pictures(comparison_page(small())):
        assert [e.tag.removeprefix(NAMESPACE) for e in picture][:2] == ["title", "desc"]
        assert all(e.text for e in list(picture)[:2])


def test_ten_entries_with_ten_seeds_stay_small():
    assert len(comparison_page(large()).encode()) < 300_000


def test_a_long_error_is_cut_at_its_beginning():
    runs = [
        run("ce", 0),
        Run(entry="a", seed=0, folder="runs/a", state="failed", error="x" * 9999 + "end"),
    ]
    (shown,) = Page(comparison_page(comparison(runs))).texts("pre")
    assert shown.startswith("… x")
    assert shown.endswith("end")
    assert len(shown) < 1010


def test_the_same_comparison_gives_the_same_page():
    assert comparison_page(small()) == comparison_page(small())
