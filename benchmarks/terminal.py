"""What a terminal shows, as pictures for docs/: the bar of a real run on digits, and the steps of the tutorial.

    python -m benchmarks.terminal docs

The tutorial's commands run on parts of the two photographs that come with scikit-learn, with a few planted mistakes;
trainings get a minute. The pictures hold no font and no address, unlike what rich exports by default.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

import nearkin
from nearkin.training import trainer
from nearkin.training.console import Bar

WIDTH = 100
FORMAT = re.sub(r"@font-face \{\{.*?\n\s*\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.S)
FORMAT = re.sub(r"<!--.*?-->\n", "", FORMAT).replace(
    "Fira Code, monospace", "ui-monospace, monospace"
)
EACH = 24  # photos of a kind
# Picture (empty: none) and command, in the order of docs/photos.md.
STEPS = (
    ("doctor", "nearkin doctor photos/"),
    ("first", "nearkin train photos/ --epochs 0 --out first"),
    ("table", "nearkin doctor photos/ --marks marks.csv --write-table clean.csv"),
    ("", "nearkin train clean.csv --out clean --minutes 1"),
    ("evaluate", "nearkin evaluate clean other/"),
    ("export", "nearkin export clean --format onnx"),
)


def screen() -> Console:
    return Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)


def drawn(shown: Console) -> str:
    return shown.export_svg(title="nearkin", code_format=FORMAT)


class Terminal(io.StringIO):
    """A standard error that is taken for a terminal, and shows nothing."""

    def isatty(self) -> bool:
        return True


class Photographed(Bar):
    """The bar, with a picture after the third validation."""

    picture = ""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self._screen = screen()
        self._screen.print("$ nearkin train digits --objective supcon --epochs 5", highlight=False)
        self._validations = 0

    def say(self, text: str) -> None:
        super().say(text)
        self._screen.print(text, markup=False, highlight=False)

    def update(self, step: int, record: dict[str, Any]) -> None:
        super().update(step, record)
        self._validations += record["kind"] == "validation"
        if self._validations == 3 and record["kind"] == "train" and not Photographed.picture:
            self._screen.print(self._progress.get_renderable())
            Photographed.picture = drawn(self._screen)


def bar() -> str:
    """Train on digits in the present folder."""
    trainer.Bar = Photographed  # type: ignore[attr-defined]
    with contextlib.redirect_stderr(Terminal()):
        nearkin.train("digits", "supcon", epochs=5, out="runs/digits-supcon", quiet=False)
    return Photographed.picture


def write_photos() -> None:
    """photos/ and other/ in the present folder: temples and dahlias, one of them among the temples, a copy, a photo
    that is too dark, and the marks of a person."""
    from sklearn.datasets import load_sample_image

    draw = np.random.default_rng(0)
    for kind, name in (("temple", "china.jpg"), ("dahlia", "flower.jpg")):
        whole = Image.fromarray(load_sample_image(name))
        for number in range(EACH + 8):
            left, top = draw.integers((640 - 240, 427 - 180))
            part = whole.crop((left, top, left + 240, top + 180)).resize((400, 300))
            folder = Path("photos" if number < EACH else "other") / kind
            folder.mkdir(parents=True, exist_ok=True)
            part.save(folder / f"IMG_{number:04}.jpg", quality=90)
    shutil.copy("photos/dahlia/IMG_0003.jpg", "photos/dahlia/IMG_0003 (1).jpg")
    Path("photos/dahlia/IMG_0005.jpg").rename("photos/temple/IMG_0105.jpg")
    dark = Image.open("photos/temple/IMG_0007.jpg").point(lambda value: value // 16)
    dark.save("photos/temple/IMG_0107.jpg")
    Path("marks.csv").write_text(
        "path,label,split,mark,correct\n"
        "temple/IMG_0105.jpg,temple,train,wrong label,dahlia\n"
        "temple/IMG_0107.jpg,temple,train,leave out,\n"
    )


def step(command: str) -> str:
    """Run a command in the present folder: what it prints for a terminal that is no one's."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # both in the order in which they are written
        text=True,
        check=True,
    )
    shown = screen()
    shown.print(f"$ {command}", highlight=False)
    shown.print(done.stdout.rstrip(), markup=False, highlight=False)
    return drawn(shown)


def main(docs: Path) -> None:
    """Write terminal.svg and tutorial-STEP.svg into a folder."""
    docs, here = docs.absolute(), Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        found = {"terminal": bar()}
        write_photos()
        found |= {f"tutorial-{name}": step(command) for name, command in STEPS}
        os.chdir(here)
    for name, picture in found.items():
        if name != "tutorial-":
            (docs / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
