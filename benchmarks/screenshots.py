"""The pictures of a report in docs/: of a run on digits, on a wide screen and, in dark colours, on a phone.

    python -m benchmarks.screenshots docs

Needs playwright (group dev) and a Chromium. Two trainings of half a minute: the page compares them.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import nearkin

if TYPE_CHECKING:
    from playwright.sync_api import Page

GAP, GREY = 20, (92, 96, 104)  # between the views of the phone


def main(folder: Path) -> None:
    """See above."""
    folder = folder.absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # so that the page names no folder of this machine
        for objective in ("ce", "cone"):
            nearkin.train("digits", objective, out=f"runs/digits-{objective}")
        page = Path("runs/digits-cone/report.html").absolute()
        take(page, folder)


def take(page: Path, folder: Path) -> None:
    """Both pictures of the page."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        wide: dict[str, Any] = {"viewport": {"width": 1440, "height": 1320}}
        shown = browser.new_context(**wide, color_scheme="light").new_page()
        _open(shown, page)
        shown.screenshot(path=folder / "report-1440.png")
        phone: dict[str, Any] = {"viewport": {"width": 390, "height": 844}}
        shown = browser.new_context(**phone, color_scheme="dark").new_page()
        _open(shown, page)
        views = [shown.screenshot()]
        shown.locator("#map-projection").evaluate("e => e.closest('section').scrollIntoView()")
        views.append(shown.screenshot())
        shown.locator("#map-list .option").first.click()
        shown.wait_for_selector("#kin.open")
        views.append(shown.screenshot())
        _beside([Image.open(io.BytesIO(each)) for each in views]).save(
            folder / "report-390-dark.png"
        )
        browser.close()


def _open(shown: Page, page: Path) -> None:
    shown.goto(page.as_uri())
    shown.wait_for_selector("#map-list .option")
    shown.wait_for_timeout(500)  # the map is drawn


def _beside(views: list[Image.Image]) -> Image.Image:
    width, height = views[0].size
    whole = Image.new("RGB", (len(views) * (width + GAP) - GAP, height), GREY)
    for place, view in enumerate(views):
        whole.paste(view, (place * (width + GAP), 0))
    return whole


if __name__ == "__main__":
    main(Path(sys.argv[1]))
