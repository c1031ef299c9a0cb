"""From a photo that is marked in the page of a real run to a training without the mistake."""

from __future__ import annotations

import csv

import pytest
from tests.pictures import write_classes
from tests.report.test_run_page_in_browser import marked

import nearkin
from nearkin.cli import run

SMALL = {
    "epochs": 1,
    "batch_size": 8,
    "model": "resnet10t",
    "model_options": {"channels": [8, 8, 8, 8]},
}


@pytest.mark.slow
def test_what_is_marked_is_corrected_and_left_out(browser, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos", each=24)
    nearkin.train("photos", "ce", out="run", **SMALL)
    with browser.new_context(viewport={"width": 1440, "height": 900}) as context:
        page = context.new_page()
        page.goto((tmp_path / "run/report.html").as_uri())
        page.wait_for_selector("#map-list .option")
        paths = []
        for place, mark in ((0, "wrong label"), (1, "leave out")):
            page.locator("#map-list .option").nth(place).click()
            page.locator(f"#kin [data-mark='{mark}']").click()
            paths.append(page.locator("#kin .path code").inner_text())
            if mark == "wrong label":
                page.locator(".right-label select").select_option(index=1)
        (tmp_path / "marks.csv").write_bytes(marked(page))
    wrong, gone = paths
    words = ["doctor", "photos", "--marks", "marks.csv", "--write-table", "clean.csv"]
    assert run([*words, "--no-labels", "--no-forecast"]) == 0
    with (tmp_path / "clean.csv").open(newline="") as file:
        rows = {row["path"]: row["label"] for row in csv.DictReader(file)}
    assert len(rows) == 47
    assert f"photos/{gone}" not in rows
    before = wrong.split("/")[0]
    assert rows[f"photos/{wrong}"] == {"cat": "dog", "dog": "cat"}[before]
    nearkin.train("clean.csv", "ce", out="clean", **SMALL)
    capsys.readouterr()
