"""Progress on stderr: a bar in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from nearkin.errors import printable

if TYPE_CHECKING:
    from nearkin.training.metrics_log import Journal


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def say(text: str, quiet: bool) -> None:
    """One line on stderr."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


class Bar:
    """Shows steps, images per second, remaining time, the loss, the last validation and the best one; `quiet`: only
    warnings; `silent`: nothing.

    images: in a step. What `say` and `warn` show is in the journal's log as well.
    """

    def __init__(
        self, steps: int, images: int, journal: Journal, *, quiet: bool, silent: bool
    ) -> None:
        self._steps, self._images = steps, images
        self._quiet, self._silent = quiet or silent, silent
        self._journal = journal
        self._loss = self._value = self._rate = ""
        self._best: float | None = None  # of the stage
        self._began: tuple[int, float] | None = None  # the step that was seen first, and when
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
                progress.TextColumn(
                    "{task.fields[rate]}  {task.fields[loss]}  {task.fields[value]}"
                ),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(
                "train", total=self._steps, rate="", loss="", value=""
            )
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
            self._best = record["value"] if record["best"] else self._best
            best = "" if self._best is None else f" (best {100 * self._best:.2f} %)"
            self._value = f"{record['metric']} {100 * record['value']:.2f} %{best}"
        left = self._measure(step)
        if self._progress is not None:
            shown = {"rate": self._rate, "loss": self._loss, "value": self._value}
            self._progress.update(self._task, completed=step, **shown)
        elif record["kind"] == "validation" and step > 0 and not self._quiet:
            epoch, stage = record["epoch"] + 1, record["stage"]
            where = f"{stage} epoch {epoch}  step {step}/{self._steps}"
            parts = [where, self._loss, self._value, self._rate, left]
            self._print("  ".join(part for part in parts if part))

    def _measure(self, step: int) -> str:
        """Update the rate; the remaining time in words. Validation counts, since it takes part of the time."""
        now = time.monotonic()
        if self._began is None:
            self._began = step, now
        first, began = self._began
        if step <= first or now <= began:
            return ""
        rate = (step - first) / (now - began)
        self._rate = f"{rate * self._images:.0f} images/s"
        return f"{duration((self._steps - step) / rate)} left" if step < self._steps else ""

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
