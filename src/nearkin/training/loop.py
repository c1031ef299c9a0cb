"""The training loop: takes steps, records losses, validates, saves and stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from nearkin.data.dataset import Dataset
from nearkin.data.loader import WorkersDied
from nearkin.distributed import Flags, Runtime
from nearkin.errors import DataError, DivergedError, Stopped
from nearkin.files import SaveFailed
from nearkin.objectives import Stage
from nearkin.process import stop_requested
from nearkin.settings import Settings
from nearkin.training.checkpoint.saver import Saver
from nearkin.training.checkpoint.snapshot import Snapshot
from nearkin.training.checks import CollapseWatch
from nearkin.training.console import Bar
from nearkin.training.metrics_log import Journal, Meters
from nearkin.training.run_folder import write_json
from nearkin.training.step import Stepper
from nearkin.types import Batch, Loss, Progress

REPLAY = "replay.json"
CURVE = 20  # validations that a run has at least, if it has as many epochs
PROBE = "probe"  # in the journal, the stage of the validation before the first step

NO_IMAGES = (Stopped, WorkersDied, DataError)  # why the next images do not come


class Leg(NamedTuple):
    """A stage with its place in the run: optimiser steps from `first` (inclusive) to `last` (exclusive)."""

    number: int
    stage: Stage
    first: int
    last: int


def legs(stages: tuple[Stage, ...], epochs: int, steps_per_epoch: int) -> list[Leg]:
    """Divide the epochs among the stages, at least one each where there are enough; the last gets the rest."""
    result: list[Leg] = []
    first = 0
    for number, stage in enumerate(stages):
        rest = epochs - first // max(1, steps_per_epoch) - (len(stages) - number - 1)
        wanted = rest if number == len(stages) - 1 else max(1, round(stage.share * epochs))
        last = first + max(0, min(wanted, rest)) * steps_per_epoch
        result.append(Leg(number, stage, first, last))
        first = last
    return result


def validation_interval(dataset: Dataset, epochs: int) -> int:
    """Epochs from one validation to the next, so that more validation than training images do not take most of the
    time: validation images / training images, at most a twentieth of `epochs`, those of the run, at least 1."""
    train, val = (
        len(dataset.splits[name].labels) if name in dataset.splits else 0
        for name in ("train", "val")
    )
    return max(1, min(val // max(1, train), epochs // CURVE))


class Loop:
    """Trains the stages of a run from the start or from a snapshot.

    loader(stage, first, last): yields this process's blocks of the batches. listed(step): the images and labels of a
    whole batch, by name. validate(): a record with `value`, or None without a validation split; interval: epochs from
    one to the next, in each stage. probed: whether the network as given is validated before the first step.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        stepper: Stepper,
        saver: Saver,
        route: list[Leg],
        journal: Journal,
        bar: Bar,
        loader: Callable[[Stage, int, int], Iterator[Batch]],
        listed: Callable[[int], dict[str, list[int]]],
        validate: Callable[[], dict[str, Any] | None],
        interval: int,
        probed: bool,
    ) -> None:
        self.settings, self.runtime, self.stepper = settings, runtime, stepper
        self.saver, self.journal, self.bar = saver, journal, bar
        self.route, self.steps = route, route[-1].last
        self.loader, self.listed, self.validate = loader, listed, validate
        self.interval, self.probed = interval, probed
        self.meters = Meters(runtime.device)
        self.flags = Flags(runtime)
        self.collapse = CollapseWatch()
        self.diverged = False
        self._clock = time.monotonic()

    def run(self, snapshot: Snapshot | None) -> int:
        """Train to the end of the route and return the last step. Raises Stopped or DivergedError."""
        try:
            return self._run(snapshot)
        except DivergedError:  # of the loss, of validation or of a weight
            self.diverged = True
            raise

    def _run(self, snapshot: Snapshot | None) -> int:
        step = 0
        if snapshot is None and self.probed:
            self._start_from_probe()
        for leg in self.route:
            if snapshot is not None and snapshot.state["stage"] > leg.number:
                continue
            if snapshot is None and leg.number > 0:
                self._start_from(leg.stage)
            self.stepper.begin(leg.stage)
            if snapshot is None:
                step = self._train(leg, leg.first)
            else:
                self.saver.restore(snapshot, self.meters, self.collapse)
                self.bar.best = self.saver.best.value if self.saver.best else None
                if not snapshot.state.get("validated", True):
                    self._record_validation(self._progress(leg, snapshot.step - 1), snapshot.step)
                step = self._train(leg, snapshot.step, saved=True)
                snapshot = None
        return step

    def status(self, state: str, step: int, epoch: int, message: str = "") -> None:
        """Replace status.json."""
        best = self.saver.best and self.saver.best._asdict()
        self.journal.status(
            state, step=step, steps=self.steps, epoch=epoch, best=best, message=message
        )

    def _start_from_probe(self) -> None:
        """Validate the network as it is, with its classifier: what the run gives is at least as good."""
        self.stepper.begin(self.route[-1].stage)
        self._record_validation(Progress(PROBE, 0, 0, 0, 0), 0)
        if self.saver.best is not None:
            top1 = 100 * self.saver.best.value
            self.journal.log(f"probe of the frozen features: val top-1 {top1:.2f} %")
        if len(self.route) > 1:
            self.saver.keep_probe()

    def _start_from(self, stage: Stage) -> None:
        """The first weights of a later stage: the best so far, or those that the stage before has ended with, averaged
        where its average was validated."""
        average = self.stepper.ema
        if stage.start == "best":
            weights = self.runtime.share(self.saver.final_weights(self.bar.warn))
        else:
            weights = None if average is None else average.network.state_dict()
        if weights is not None:
            self.stepper.network.load_state_dict(weights)
        self.saver.forget_best()

    def _train(self, leg: Leg, step: int, saved: bool = False) -> int:
        first, batches = step, self.loader(leg.stage, step, leg.last)
        while step < leg.last:
            batch = self._next(batches, leg, step, step > first)
            progress = self._progress(leg, step)
            loss = self.stepper.step(batch, progress, step)
            stop = self._exchange_flags(loss, step)
            step, saved = step + 1, False
            self.meters.add(loss)
            self.bar.tick(step, leg.stage.name, progress.epoch)
            if step % self.settings.log_every == 0 or step == leg.last:
                self._record_losses(progress, step)
            ended = step % self.stepper.steps_per_epoch == 0
            if ended:
                self._check_last_step(step)
                self._record_epoch(progress, step)
                if step == leg.last or (progress.epoch + 1) % self.interval == 0:
                    try:
                        self._record_validation(progress, step)
                    except NO_IMAGES:
                        self._save(leg, step, validated=False)
                        raise
            if stop:
                self._check_last_step(step)
                # The other processes must not end before the checkpoint is whole.
                saved = self.runtime.share(self._save(leg, step))
                how = "everything is saved" if saved else "the last steps could not be saved"
                raise Stopped(f"Stopped at step {step} of {self.steps} on request; {how}.")
            if self._due(loss, ended) and step < leg.last:
                self._save(leg, step)
        if not saved:
            self._save(leg, step)
        return step

    def _next(self, batches: Iterator[Batch], leg: Leg, step: int, unsaved: bool) -> Batch:
        """The next batch. If none can be had, the steps so far are saved first: none is in progress here."""
        try:
            return next(batches)
        except NO_IMAGES:
            if unsaved:
                self._check_last_step(step)
                self._save(leg, step)
            raise

    def _progress(self, leg: Leg, step: int) -> Progress:
        done, steps, per_epoch = (
            step - leg.first,
            leg.last - leg.first,
            self.stepper.steps_per_epoch,
        )
        return Progress(leg.stage.name, done, steps, done // per_epoch, steps // per_epoch)

    def _exchange_flags(self, loss: Loss, step: int) -> bool:
        """Send the flags of this step; return whether any process asked to stop in the step before."""
        stop, bad = self.flags.read()
        self.flags.post(stop_requested(), ~torch.isfinite(loss.total.detach()))
        if bad:
            self._raise_diverged(step - 1)
        return stop

    def _check_last_step(self, step: int) -> None:
        """Wait for the flags of the step just taken: a loss that is not finite is neither validated nor saved."""
        stop, bad = self.flags.read()
        if bad:
            self._raise_diverged(step - 1)
        finite = torch.zeros((), dtype=torch.bool, device=self.runtime.device)
        self.flags.post(stop or stop_requested(), finite)

    def _due(self, loss: Loss, ended: bool) -> bool:
        """Whether to save now, on the first process. A loss that is not finite is not saved; all processes read it in
        the flags of the next step and stop together."""
        due = self.runtime.is_main and self.saver.due(ended)
        return due and bool(torch.isfinite(loss.total.detach()))

    def _raise_diverged(self, step: int) -> None:
        where = ""
        if self.runtime.is_main:
            # Set by the stepper before this step; all other draws are keyed to (seed, step, sample).
            generator = torch.Generator().manual_seed(self.settings.seed + step)
            state = generator.get_state().tolist()
            replay = {"step": step, "seed": self.settings.seed, **self.listed(step)}
            try:
                write_json(self.journal.folder / REPLAY, replay | {"rng_state": state})
                where = f"; the batch is listed in {REPLAY}"
            except SaveFailed as error:  # no reason to call the run resumable
                self.bar.warn(str(error))
        raise DivergedError(
            f"The loss is not finite at step {step} of {self.steps}{where}, and no checkpoint was written "
            "since. Start a new run with a lower --lr, --clip-grad 1 or --precision fp32."
        )

    def _record_losses(self, progress: Progress, step: int) -> None:
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        values = {"lr": self.stepper.lr, **self.meters.take()}
        self._record("train", progress, step, values, seconds)

    def _record_epoch(self, progress: Progress, step: int) -> None:
        means, counts = self.meters.take_epoch()
        self._record("epoch", progress, step, means | counts, 0.0)
        collapsed = {n: float(value) for n, value in self.stepper.at_collapse.terms.items()}
        warning = self.collapse.check(progress.stage, progress.epoch, means, collapsed)
        if warning:
            self.bar.warn(warning)

    def _record_validation(self, progress: Progress, step: int) -> None:
        started = time.monotonic()
        values = self.validate()
        if values is not None:
            values["best"] = self.saver.consider(values["value"], step, values.get("log_loss", 0.0))
            self._record("validation", progress, step, values, time.monotonic() - started)

    def _record(
        self, kind: str, progress: Progress, step: int, values: dict[str, Any], seconds: float
    ) -> None:
        """Write one event to the journal and the progress bar."""
        place: dict[str, Any] = {"stage": progress.stage, "epoch": progress.epoch}
        self.journal.record(kind, **place, step=step, clock={"seconds": seconds}, **values)
        self.status("running", step, progress.epoch)
        self.bar.update(step, {"kind": kind, **place, **values})

    def _save(self, leg: Leg, step: int, *, validated: bool = True) -> bool:
        """Whether the disk took it; if not, that is said. validated: if not, a resumed run begins with that."""
        warning = self.saver.save(step, leg.number, self.meters, self.collapse, validated)
        if warning:
            self.bar.warn(warning)
        return warning is None
