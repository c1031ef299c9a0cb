"""The page in Chromium, narrow and wide, light and dark. Needs playwright and a Chromium that is installed.

NEARKIN_AXE names a copy of axe.min.js (npm package axe-core); with it the rules of WCAG are checked, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.comparison.comparisons import large, small

from nearkin.comparison.page import comparison_page

pytestmark = pytest.mark.slow


@pytest.fixture(params=[small, large], ids=["small", "large"])
def address(request, tmp_path):
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(request.param()), "utf-8")
    return path.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_is_whole(browser, address, width, scheme):
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url))
    page.goto(address)
    assert said == [address]  # no complaint, and nothing else was fetched
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('svg.chart')].every(svg => { const box = svg.getBoundingClientRect();"
        "return [...svg.querySelectorAll('.mark, .bar, .interval')].every(mark => { const m ="
        "mark.getBoundingClientRect(); return m.left >= box.left - 1 && m.right <= box.right + 1; }); })"
    )
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(browser, address, width, scheme):
    path = os.environ.get("NEARKIN_AXE")
    if not path:
        pytest.skip("NEARKIN_AXE names no copy of axe.min.js")
    # The page forbids scripts, so the check has to pass by its policy.
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(address)
    page.evaluate(Path(path).read_text("utf-8"))
    violations = page.evaluate("axe.run().then(found => found.violations)")
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
    context.close()
