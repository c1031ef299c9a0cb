"""The page of a run in Chromium, narrow and wide, light and dark, by pointer and by keyboard.

Needs playwright and a Chromium that is installed. NEARKIN_AXE names a copy of axe.min.js (npm package axe-core); with
it the rules of WCAG are checked, too. NEARKIN_SCREENSHOTS names a folder for pictures of the page.
"""

from __future__ import annotations

import csv
import io
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.report.reports import facts, hostile, many_classes, report_data, small

from nearkin.report.run import run_page

pytestmark = pytest.mark.slow
DATA = {"small": small, "hostile": hostile, "many": many_classes}
VIEWS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name, make in DATA.items():
        path = folder / f"{name}.html"
        path.write_text(run_page(make(), facts(make())), "utf-8")
        found[name] = path.as_uri()
    return found


@contextmanager
def opened(browser, address, width=1440, scheme="light", *, others=(), **options):
    """The page; nothing may be said on the console, and nothing fetched but the page and `others`."""
    said: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **options
    )
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(address)
    page.wait_for_selector("#map-list .option")
    yield page
    assert {each for each in said if not each.startswith("data:image/webp")} == {address, *others}
    context.close()


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", DATA)
def test_the_page_is_whole(browser, addresses, name, width, scheme):
    with opened(browser, addresses[name], width, scheme) as page:
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
        assert page.locator("#kin").is_visible() == (width == 1440)
        if folder := os.environ.get("NEARKIN_SCREENSHOTS"):
            page.screenshot(
                path=Path(folder) / f"report-{name}-{width}-{scheme}.png", full_page=True
            )


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", DATA)
def test_axe_finds_nothing(browser, addresses, name, width, scheme):
    path = os.environ.get("NEARKIN_AXE")
    if not path:
        pytest.skip("NEARKIN_AXE names no copy of axe.min.js")
    # The page forbids other scripts, so the check has to pass by its policy.
    with opened(browser, addresses[name], width, scheme, bypass_csp=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        page.locator(".cards [data-mark]").first.click()
        page.locator(".matrix .miss").first.click()
        page.evaluate(Path(path).read_text("utf-8"))
        found = page.evaluate("axe.run().then(found => found.violations)")
        assert [
            (v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"]) for v in found
        ] == []


def test_it_opens_with_the_worst_error_and_its_kin(browser, addresses):
    data = small()
    with opened(browser, addresses["small"]) as page:
        worst = int(data.worst[0])
        assert page.locator("#kin .path").inner_text() == data.images.names[worst]
        labels = page.locator(".kin-list .kin-label").all_inner_texts()
        own = data.images.labels[worst]
        expected = [data.images.labels[place] for place in data.kin.index[worst]]
        assert labels == [("" if e == own else "≠ ") + data.classes[e] for e in expected]
        weights = [
            float(text.removesuffix(" %")) for text in page.locator(".weight").all_inner_texts()
        ]
        assert weights == pytest.approx(100 * data.kin.weight[worst], abs=0.06)
        votes = page.locator(".votes tbody tr").all_inner_texts()
        assert len(votes) == len(data.kin.votes[worst])
        assert "without" in page.locator("#kin").inner_text()


def test_a_click_shows_the_kin_of_an_image(browser, addresses):
    data = small()
    with opened(browser, addresses["small"]) as page:
        place = int(data.uncertain[2])
        page.locator(f".cards .pick[data-place='{place}']").last.click()
        assert page.locator("#kin .path").inner_text() == data.images.names[place]
        kin = page.locator(".kin-list .pick").nth(3)
        name = data.images.names[int(kin.get_attribute("data-place"))]
        kin.click()  # from kin to kin
        assert page.locator("#kin .path").inner_text() == name
        page.locator(".kin-list .pick").nth(2).focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "kin-title"


def test_a_cell_shows_its_images(browser, addresses):
    data = small()
    pair = data.pairs[0]
    numbers = [data.classes.index(name) for name in (pair.true, pair.predicted)]
    with opened(browser, addresses["small"]) as page:
        page.locator(f".matrix [data-pair='{numbers[0]},{numbers[1]}']").click()
        assert page.locator("#pair-title").inner_text() == (
            f"{pair.true}, taken for {pair.predicted} ({pair.images})"
        )
        assert page.locator("#pair-images .pick").count() == pair.images
        shown = page.locator("#kin .path").inner_text()
        assert shown in [data.images.names[place] for place in pair.examples]


def test_on_a_phone_a_cell_shows_its_images_and_no_panel_over_them(browser, addresses):
    with opened(browser, addresses["small"], width=390) as page:
        page.locator(".matrix .miss").first.click()
        assert page.evaluate("document.activeElement.id") == "pair-title"
        box = page.locator("#pair-images .pick").first.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.click(*middle)
        assert page.locator("#kin").is_visible()


@pytest.mark.parametrize("width", [390, 1440])
def test_the_keyboard_is_enough(browser, addresses, width):
    data = small()
    with opened(browser, addresses["small"], width) as page:
        page.locator("#map-list").focus()
        for key in ("ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        wrong = [p for p in range(40) if data.images.labels[p] != data.images.predicted[p]]
        assert page.locator("#kin .path").inner_text() == data.images.names[wrong[1]]
        assert page.evaluate("document.activeElement.id") == "kin-title"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "map-list"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")  # the list goes on where it was
        assert page.locator("#kin .path").inner_text() == data.images.names[wrong[2]]
        page.keyboard.press("Escape")
        assert page.locator("#kin").is_visible() == (width == 1440)
        card = page.locator(".cards .pick").nth(1)
        card.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "kin-title"
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.dataset.place") == card.get_attribute(
            "data-place"
        )


def test_the_map_zooms_and_names_what_is_in_view(browser, addresses):
    with opened(browser, addresses["small"]) as page:
        count = page.locator("#map-count")
        assert count.inner_text().startswith("100 images in view, 8 of them")
        page.locator("#map-in").click(click_count=3)
        page.wait_for_timeout(400)
        assert not count.inner_text().startswith("100 images")
        page.locator("#map").focus()
        page.keyboard.press("0")
        page.wait_for_timeout(400)
        assert count.inner_text().startswith("100 images")
        page.locator("#map-errors").check()
        assert page.locator("#map-list .option").count() == 8
        page.locator("#map-errors").uncheck()
        page.locator("#map-training").uncheck()
        assert page.locator("#map-list .option").count() == 40
        page.locator("#map-class").select_option("1")
        assert page.locator("#map-list .option").count() == 10


def test_a_point_of_the_map_is_hovered_and_clicked(browser, addresses):
    data = small()
    with opened(browser, addresses["small"]) as page:
        page.locator("#map").scroll_into_view_if_needed()
        box = page.locator("#map").bounding_box()
        place = int(data.worst[1])
        x, y = map(float, data.images.places[place])
        across, up = map(float, np.ptp(data.images.places, axis=0))
        size = 0.92 * min(box["width"] / across, box["height"] / up)
        where = (
            box["x"] + box["width"] / 2 + (x - 0.5) * size,
            box["y"] + box["height"] / 2 - (y - 0.5) * size,
        )
        page.mouse.move(*where)
        page.wait_for_selector("#map-tip", state="visible")
        assert "taken for" in page.locator("#map-tip").inner_text()
        page.mouse.down()
        page.mouse.up()
        shown = page.locator("#kin .path").inner_text()
        assert shown in [data.images.names[p] for p in data.worst]


def marked(page):
    with page.expect_download() as download:
        page.locator("#marks-save").click()
    assert download.value.suggested_filename == "marks.csv"
    return Path(download.value.path()).read_bytes()


@pytest.mark.parametrize("name", ["small", "hostile"])
def test_marks_are_saved_exactly(browser, addresses, name):
    data = DATA[name]()
    wrong, other, leave = int(data.worst[0]), int(data.worst[1]), int(data.suspicious[0])
    with opened(browser, addresses[name]) as page:
        assert page.locator("#marks").is_hidden()
        for place, mark in ((wrong, "wrong label"), (leave, "leave out"), (other, "wrong label")):
            page.locator(f".cards [data-of='{place}'][data-mark='{mark}']").first.click()
        assert page.locator(".right-label").is_visible()  # of the first, whose kin are shown
        right = int(data.images.predicted[wrong])
        page.locator(".right-label select").select_option(str(right))
        pressed = f".cards [data-of='{wrong}'][aria-pressed=true]"
        assert page.locator(pressed).count() >= 1
        assert page.locator("#marks-count").inner_text() == "3 images marked"
        text = marked(page).decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        names, labels, classes = data.images.names, data.images.labels, data.classes
        assert header == ["path", "label", "split", "mark", "correct"]
        expected = [
            [names[wrong], classes[labels[wrong]], "test", "wrong label", classes[right]],
            [names[other], classes[labels[other]], "test", "wrong label", ""],
            [names[leave], classes[labels[leave]], "train", "leave out", ""],
        ]
        assert sorted(rows) == sorted(expected)
        page.locator(pressed).first.click()  # once more takes the mark back
        assert page.locator("#marks-count").inner_text() == "2 images marked"
        page.reload()
        assert page.locator("#marks-count").inner_text() == "2 images marked"
        page.locator("#marks-clear").click()
        assert page.locator("#marks").is_hidden()


def test_the_right_label_on_the_page_is_the_saved_one(browser, addresses):
    data = small()
    place = int(data.worst[0])
    with opened(browser, addresses["small"]) as page:
        wrong = page.locator("#kin [data-mark='wrong label']")
        wrong.click()
        page.locator(".right-label select").select_option(str(int(data.images.predicted[place])))
        assert data.classes[int(data.images.predicted[place])].encode() in marked(page)
        page.locator("#kin [data-mark='leave out']").click()
        wrong.click()
        assert page.locator(".right-label select").input_value() == "-1"
        assert marked(page).endswith(b'"wrong label",""\n')


def test_marks_stay_with_their_images(browser, tmp_path):
    """The same page with other images before: the place of an image is another one."""
    few, more = (report_data(evaluated=count) for count in (40, 44))
    path = tmp_path / "page.html"
    path.write_text(run_page(few, facts(few)), "utf-8")
    with opened(browser, path.as_uri()) as page:
        leave = int(few.suspicious[0])
        page.locator(f".cards [data-of='{leave}'][data-mark='leave out']").first.click()
        page.locator("#marks-save").wait_for()  # on a busy machine the page reacts later
        path.write_text(run_page(more, facts(more)), "utf-8")
        page.reload()
        assert few.images.names[leave].encode() in marked(page)


def test_marks_of_another_page_stay(browser, tmp_path):
    """Of a run with the same name elsewhere, which the browser may keep in the same place; and those of images that
    are not in the page."""
    data, other = report_data(), report_data(names="other/{}/{}.jpg")
    worst = int(data.worst[0])
    one, two = (tmp_path / name / "page.html" for name in ("one", "two"))
    for path in (one, two):
        path.parent.mkdir()
        path.write_text(run_page(data, facts(data)), "utf-8")
    with opened(browser, one.as_uri(), others=[two.as_uri()]) as page:
        page.locator(f".cards [data-of='{worst}'][data-mark='leave out']").first.click()
        page.goto(two.as_uri())
        assert page.locator("#marks").is_hidden()
        page.locator(f".cards [data-of='{worst}'][data-mark='wrong label']").first.click()
        one.write_text(run_page(other, facts(other)), "utf-8")
        page.goto(one.as_uri())
        assert page.locator("#marks").is_hidden()
        page.locator(f".cards [data-of='{worst}'][data-mark='wrong label']").first.click()
        one.write_text(run_page(data, facts(data)), "utf-8")
        page.goto(one.as_uri())
        (row,) = marked(page).decode().splitlines()[1:]
        assert data.images.names[worst] in row
        assert '"leave out"' in row


def test_marks_of_two_tabs_are_kept(browser, tmp_path):
    data = report_data()
    path = tmp_path / "page.html"
    path.write_text(run_page(data, facts(data)), "utf-8")
    with opened(browser, path.as_uri()) as page:
        second = page.context.new_page()
        second.goto(path.as_uri())
        for tab, place in ((page, data.worst[0]), (second, data.worst[1])):
            tab.locator(f".cards [data-of='{place}'][data-mark='leave out']").first.click()
            tab.locator("#marks-save").wait_for()
        for tab in (page, second):
            tab.locator("#marks-count", has_text="2 images marked").wait_for()
        page.reload()
        assert page.locator("#marks-count").inner_text() == "2 images marked"


def test_what_is_copied(browser, tmp_path):
    for name, expected in (("{}/{}.jpg", "/data/test/"), ("/photos/{}/{}.jpg", "/photos/test/")):
        data = replace(report_data(names=name), root="/data/")
        path = tmp_path / "page.html"
        path.write_text(run_page(data, facts(data)), "utf-8")
        with opened(browser, path.as_uri()) as page:
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            page.locator("#kin [data-copy]").click()
            page.locator("#kin [data-copy]", has_text="Copied").wait_for()  # the page forbids eval
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied.startswith(expected)


def test_a_cell_counts_images_that_are_not_in_the_page(browser, tmp_path, monkeypatch):
    from nearkin.evaluation import report_data as module

    monkeypatch.setattr(module, "MOST_IMAGES", 20)
    data = report_data()
    path = tmp_path / "page.html"
    path.write_text(run_page(data, facts(data)), "utf-8")
    with opened(browser, path.as_uri()) as page:
        cell = page.locator(".matrix .hit").first
        count = int(cell.inner_text())
        cell.click()
        title = page.locator("#pair-title").inner_text()
        assert f"({count}, " in title
        assert "of them in this page)" in title


def test_markup_in_names_is_text(browser, addresses):
    with opened(browser, addresses["hostile"]) as page:
        page.locator("#map-list").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator(".matrix .miss").first.click()
        assert (
            page.evaluate(
                "document.querySelectorAll('img, iframe, main script:not([type]) ~ script').length"
            )
            == 0
        )
        assert page.evaluate("document.querySelectorAll('script').length") == 2
        assert "<img src=x" in page.locator("#kin").inner_text()


def test_a_map_of_ten_thousand_points_is_drawn_in_a_frame_or_few(browser, tmp_path):
    data = report_data(6_000, 4_000, [f"class {k}" for k in range(20)], pictures=20)
    path = tmp_path / "many.html"
    path.write_text(run_page(data, facts(data)), "utf-8")
    with opened(browser, path.as_uri()) as page:
        assert page.locator("#map-count").inner_text().startswith("10000 images in view")
        milliseconds = page.evaluate(
            "new Promise(done => { const start = performance.now();"
            "document.getElementById('map-in').click();"
            "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start))); })"
        )
        assert milliseconds < 1000
