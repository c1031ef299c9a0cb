"""The site that Sphinx builds from docs/: no warning, every public name, equations as MathML, nothing from elsewhere.

Needs the group `docs`: uv run --group docs pytest -m slow tests/test_site.py
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from tests.pages import DOCS, blocks

pytest.importorskip("sphinx", reason="the group docs is not installed")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
METHODS = sorted(path.stem for path in (DOCS / "methods").glob("[a-z]*.md"))
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", folder / "trees"]
    done = subprocess.run(
        [*command, DOCS, folder / "html"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


class Page(HTMLParser):
    """What a page loads, its anchors, and the equations in it."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.anchors, self.equations = [], set(), {"block": 0, "inline": 0}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])
        self.anchors.add(given.get("id"))
        if tag == "math":
            self.equations[given.get("display", "inline")] += 1


def test_every_page_is_built(site):
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")} <= built


def elsewhere(folder):
    """What the pages and style sheets of a folder load from other places."""
    loads = {load for path in folder.rglob("*.html") for load in Page(path).loads}
    sheets = "".join(path.read_text() for path in folder.rglob("*.css"))
    found = re.findall(r"(?:url\(|@import)\s*['\"]?((?:\w+:)?//[^)'\"]*)", sheets)
    return {load for load in loads if re.match(r"(\w+:)?//", load)} | set(found)


def test_nothing_is_loaded_from_elsewhere(site):
    assert elsewhere(site) == set()


def test_a_foreign_script_would_be_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://link.example"><script src="https://script.example/x.js"></script>'
        '<link href="//sheet.example" rel="stylesheet"><img src="own.png">'
    )
    (tmp_path / "a.css").write_text("a { b: url(own.svg) } c { d: url('https://font.example/f') }")
    assert elsewhere(tmp_path) == {
        "https://script.example/x.js",
        "//sheet.example",
        "https://font.example/f",
    }


def test_options_keep_their_dashes(site):
    assert "as a share of --lr" in (site / "methods" / "attract-repulse.html").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_equations_are_mathml(site, name):
    fences = [
        code
        for language, code in blocks((DOCS / "methods" / f"{name}.md").read_text())
        if language == "math"
    ]
    page = Page(site / "methods" / f"{name}.html")
    assert page.equations["block"] == len(fences) > 0
    assert page.equations["inline"] > 0
    text = (site / "methods" / f"{name}.html").read_text()
    assert "\\sum" not in text
    assert not re.search(r">[^<]*\$[^<]*<", text), "a dollar sign is left"


@pytest.mark.parametrize("module", ["nearkin", "nearkin.functional"])
def test_every_public_name_is_in_the_reference(site, module):
    anchors = Page(site / "api.html").anchors
    public = set(importlib.import_module(module).__all__) - {"__version__"}
    assert {name for name in public if f"{module}.{name}" not in anchors} == set()


def test_the_reference_has_the_types(site):
    names = "objectives.Objective objectives.Stage network.Network types.Batch types.Loss types.Progress"
    assert {f"nearkin.{name}" for name in names.split()} <= Page(site / "api.html").anchors


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_fit_and_ask_for_nothing(site, width):
    from playwright.sync_api import sync_playwright

    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on(
            "request",
            lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None,
        )
        page.on("requestfailed", lambda r: wrong.append(r.url))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        for name in (
            "index",
            "api",
            "methods/README",
            "photos",
            *(f"methods/{m}" for m in METHODS),
        ):
            page.goto(f"{(site / name).as_uri()}.html")
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                wrong.append(f"{name} is wider than the window")
        page.goto(f"{(site / 'search').as_uri()}.html?q=supcon")
        page.locator("#search-results a", has_text="supcon").first.wait_for(timeout=10_000)
        page.goto(f"{(site / 'methods/cone').as_uri()}.html")
        wider = page.evaluate(
            "(e => e.scrollWidth > e.clientWidth)(document.querySelector('div.math'))"
        )
        browser.close()
    assert wrong == []
    assert wider == (width == 390), "a wide equation scrolls in its own box"
