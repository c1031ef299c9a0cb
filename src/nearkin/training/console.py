"""Progress on stderr: a bar in a terminal; elsewhere a line every 10 s and after each epoch."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from nearkin.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from nearkin.training.metrics_log import Journal

EVERY = 10.0  # seconds between two lines without a terminal
FRAME = 0.1  # seconds between two moves of the bar
NO_TERM = frozenset({"kind", "stage", "step", "epoch", "lr", "loss"})  # of a training record


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def say(text: str, quiet: bool) -> None:
    """One line on stderr."""
    if not quiet:
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
            print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def loss_words(record: Mapping[str, Any]) -> str:
    """`loss 1.9530 (ce 1.2041, supcon 1.4978)`: the loss of a training record, and its terms where it has several."""
    terms = [f"{name} {value:.4f}" for name, value in record.items() if name not in NO_TERM]
    shown = f" ({', '.join(terms)})" if len(terms) > 1 else ""
    return f"loss {record['loss']:.4f}{shown}"


def live(console: Console) -> Progress:
    """The bar: steps, remaining time and rate in the first line, loss and validation in the second. Its task has the
    fields `rate`, `loss` and `value`."""
    from rich import progress
    from rich.console import RenderableType
    from rich.text import Text

    class Two(progress.Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.tasks:
                yield self.make_tasks_table([task])
                words = "  ".join(
                    text for text in (task.fields["loss"], task.fields["value"]) if text
                )
                yield Text(words, no_wrap=True, overflow="ellipsis")

    return Two(
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        console=console,
    )


class Bar:
    """Shows steps, images per second, remaining time, the loss with its terms, the last validation and the best one;
    `quiet`: only warnings; `silent`: nothing.

    images: in a step. What `say` and `warn` show is in the journal's log as well.
    """

    def __init__(
        self, steps: int, images: int, journal: Journal, *, quiet: bool, silent: bool
    ) -> None:
        self._steps, self._images = steps, images
        self._quiet, self._silent = quiet or silent, silent
        self._journal = journal
        self._loss = self._value = self._rate = ""
        self.best: float | None = None  # of the stage; a run that goes on sets it
        self._began: tuple[int, float] | None = None  # the step that was seen first, and when
        self._next = 0.0  # when the next line is due, or the next move of the bar
        self._progress: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._progress = live(Console(stderr=True))
            self._task = self._progress.add_task(
                "train", total=self._steps, rate="", loss="", value=""
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
                self._progress.stop()

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Show a record of the journal."""
        if record["kind"] == "train":
            self._loss = loss_words(record)
        elif record["kind"] == "validation":
            self.best = record["value"] if record["best"] else self.best
            best = "" if self.best is None else f" (best {100 * self.best:.2f} %)"
            self._value = f"{record['metric']} {100 * record['value']:.2f} %{best}"
        left = self._measure(step)
        if self._progress is not None:
            self._move(step)
        elif record["kind"] == "validation" and step > 0 and not self._quiet:
            self._line(step, record["stage"], record["epoch"], left)

    def tick(self, step: int, stage: str, epoch: int) -> None:
        """After every step: move the bar; without a terminal, print a line when none has been printed for 10 s."""
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        if self._progress is not None:
            self._measure(step)
            self._move(step)
            self._next = now + FRAME
        elif self._began is None:  # the first step, from which the time counts
            self._measure(step)
            self._next = now + EVERY
        else:
            self._line(step, stage, epoch, self._measure(step))

    def _move(self, step: int) -> None:
        shown = {"rate": self._rate, "loss": self._loss, "value": self._value}
        self._progress.update(self._task, completed=step, **shown)

    def _line(self, step: int, stage: str, epoch: int, left: str) -> None:
        self._next = time.monotonic() + EVERY
        where = f"{stage} epoch {epoch + 1}  step {step}/{self._steps}"
        parts = [where, self._loss, self._value, self._rate, left]
        self._print("  ".join(part for part in parts if part))

    def _measure(self, step: int) -> str:
        """Update the rate; the remaining time in words. Validation counts, since it takes part of the time."""
        now = time.monotonic()
        if self._began is None:
            self._began = step, now
            if (
                self._progress is not None
            ):  # of a continued run: the steps before are not of its speed
                self._progress.reset(self._task, completed=step)
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
