"""Progress on stderr: a bar in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, Self

from nearkin.errors import printable

if TYPE_CHECKING:
    from nearkin.training.metrics_log import Journal


def say(text: str, quiet: bool) -> None:
    """One line on stderr."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


class Bar:
    """Shows steps, remaining time, the loss and the last validation; `quiet`: only warnings; `silent`: nothing.

    What `say` and `warn` show is in the journal's log as well.
    """

    def __init__(self, steps: int, journal: Journal, *, quiet: bool, silent: bool) -> None:
        self._steps, self._quiet, self._silent = steps, quiet or silent, silent
        self._journal = journal
        self._loss = self._value = ""
        self._progress: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._progress = progress.Progress(
                progress.TextColumn("training"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[loss]}  {task.fields[value]}"),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("train", total=self._steps, loss="", value="")
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show a record of the journal."""
        if record["kind"] == "train":
            self._loss = f"loss {record['loss']:.4f}"
        elif record["kind"] == "validation":
            self._value = f"{record['metric']} {100 * record['value']:.2f} %"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, loss=self._loss, value=self._value)
        elif record["kind"] == "validation" and not self._quiet:
            epoch, stage = record["epoch"] + 1, record["stage"]
            where = f"{stage} epoch {epoch}  step {step}/{self._steps}"
            self._print(f"{where}  {self._loss}  {self._value}")

    def say(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        self._journal.log(text)
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """One line that is shown with `quiet` as well."""
        self._journal.log(f"warning: {text}")
        if not self._silent:
            self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        # The terminal may be gone; training goes on.
        with contextlib.suppress(OSError, ValueError):
            if self._progress is not None:
                self._progress.console.print(printable(text), markup=False, highlight=False)
            else:
                print(printable(text), file=sys.stderr, flush=True)  # noqa: T201
