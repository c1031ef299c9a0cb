"""docs/terminal.svg: the bar of a real run on digits, in the middle of it.

    python -m benchmarks.terminal docs/terminal.svg

The picture holds no font and no address, unlike what rich exports by default.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

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


class Terminal(io.StringIO):
    """A standard error that is taken for a terminal, and shows nothing."""

    def isatty(self) -> bool:
        return True


class Photographed(Bar):
    """The bar, with a picture after the third validation."""

    picture = ""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self._screen = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
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
            Photographed.picture = self._screen.export_svg(title="nearkin", code_format=FORMAT)


def main(path: Path) -> None:
    """Train in a temporary folder, and write the picture."""
    path, here = path.absolute(), Path.cwd()
    trainer.Bar = Photographed  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(Terminal()):
        os.chdir(folder)
        nearkin.train("digits", "supcon", epochs=5, out="runs/digits-supcon", quiet=False)
        os.chdir(here)
    path.write_text(Photographed.picture, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
