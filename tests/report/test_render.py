"""Templates: what is escaped, what is missing, and whether all colours can be read."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product

import jinja2
import pytest

from nearkin.report import page
from nearkin.report.axes import SHAPES, Svg
from nearkin.report.page import TEMPLATES, render


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Renders a template that is given as text."""
    monkeypatch.setattr(page, "TEMPLATES", tmp_path)
    page._environment.cache_clear()

    def write(text: str, **values: object) -> str:
        (tmp_path / "one.html").write_text(text)
        return render("one.html", **values)

    yield write
    page._environment.cache_clear()


def test_values_are_escaped_and_pictures_are_not(template):
    assert template("<p>{{ a }}</p>", a="<b>\u202e\n\x1b") == "<p>&lt;b&gt;\\u202e\\n\\x1b</p>"
    assert template('<p id="{{ a }}">', a='" onclick="') == '<p id="&#34; onclick=&#34;">'
    assert template("{{ a }}", a=Svg("<svg/>")) == "<svg/>"
    assert template("{{ a }}", a=Svg("<svg/>") + "<b>") == "&lt;svg/&gt;&lt;b&gt;"


def test_a_missing_value_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError):
        template("{{ nothing }}")


def test_no_template_turns_escaping_off():
    for path in TEMPLATES.iterdir():
        assert not re.search(r"\bsafe\b|autoescape", path.read_text("utf-8")), path


def test_jinja2_is_imported_late():
    program = "import sys, nearkin.report.page; print('jinja2' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def colours() -> list[dict[str, str]]:
    """The variables of both colour schemes."""
    text = (TEMPLATES / "style.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    dark, light = sorted(map(luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_can_be_read(scheme):
    found = colours()[scheme]
    assert set(found) == set(colours()[0])
    for text, ground in product(("ink", "soft", "bad", "link"), ("paper", "shade", "band")):
        assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for name in [f"s{k}" for k in range(len(SHAPES))] + ["up", "down"]:
        assert contrast(found[name], found["paper"]) >= 4.5, name
        assert contrast(found[name], found["band"]) >= 3, name
