"""When a run is saved, and the contents of a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nearkin.errors import ModelError, printable
from nearkin.files import SaveFailed
from nearkin.training.checkpoint.snapshot import Damaged, Snapshot, read
from nearkin.training.checkpoint.store import Store
from nearkin.training.checks import CollapseWatch
from nearkin.training.metrics_log import Meters
from nearkin.training.step import Stepper

SHARE = 0.05  # of the elapsed time for saves at the ends of epochs
FAILURES = 3  # in a row until the run stops


class Best(NamedTuple):
    """The best weights of the current stage: validation value and log loss, and the step of the validation."""

    value: float
    step: int
    log_loss: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: of equal values the lower log loss wins (docs/decisions/017-best-epoch.md)."""
        return self.value, -self.log_loss


class Saver:
    """Saves every `minutes`, at the ends of stages, and at ends of epochs while that stays cheap.

    The best weights stay in memory until the next checkpoint, which refers to them. Processes other than the first
    (`store` None) keep the best value only.
    """

    def __init__(
        self, store: Store | None, identity: dict[str, str], minutes: float, stepper: Stepper
    ) -> None:
        self.best: Best | None = None
        self.probe: Best | None = None  # of a run with several stages
        self._store, self._identity, self._stepper = store, identity, stepper
        self._interval = minutes * 60
        self._began = self._last = time.monotonic()
        self._spent = self._cost = 0.0
        self._failures = 0
        self._waiting: dict[str, Tensor] | None = None

    def consider(self, value: float, step: int, log_loss: float = 0.0) -> bool:
        """Whether `value` is the best so far; then its weights are kept.

        Of equals the earlier wins.
        """
        found = Best(value, step, log_loss)
        if self.best and found.rank <= self.best.rank:
            return False
        self.best = found
        if self._store is not None:
            weights = self._stepper.eval_network().state_dict()
            self._waiting = {name: t.detach().cpu().clone() for name, t in weights.items()}
        return True

    def keep_probe(self) -> None:
        """Keep the best weights, those of the probe, beside the best ones of each stage."""
        self.probe = self.best
        if self._store is not None and self._waiting is not None:
            self._store.save(Snapshot(0, {"network": self._waiting}, {}), kind="probe")
        self.forget_best()

    def forget_best(self) -> None:
        """Start a new stage, which has its own best weights."""
        self.best, self._waiting = None, None

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time for a checkpoint (asked on the saving rank only)."""
        now = time.monotonic()
        if now - self._last >= self._interval:
            return True
        return epoch_ended and self._spent + self._cost <= SHARE * (now - self._began)

    def save(
        self,
        step: int,
        stage: int,
        meters: Meters,
        collapse: CollapseWatch,
        validated: bool = True,
    ) -> str | None:
        """Write a checkpoint. Returns a warning when the disk refused it. validated: whether the validation of this
        step, if it has one, is done.

        Raises SaveFailed after three refusals in a row, DivergedError when a weight is not finite.
        """
        if self._store is None:
            return None
        started = time.monotonic()
        try:
            self._save(self._store, step, stage, meters, collapse, validated)
        except SaveFailed as error:
            self._failures += 1
            if self._failures >= FAILURES:
                raise
            return f"{error} The run goes on and tries again later."
        finally:
            self._last = time.monotonic()
            self._cost = self._last - started
            self._spent += self._cost
        self._failures = 0
        return None

    def restore(self, snapshot: Snapshot, meters: Meters, collapse: CollapseWatch) -> None:
        """Load a snapshot, after the stepper has begun its stage."""
        self._stepper.load(snapshot.tensors)
        self._stepper.steps_done = snapshot.step
        collapse.load(snapshot.state["collapse"])
        meters.load(snapshot.tensors["meters"], snapshot.state["meters"])
        self._stepper.runtime.scaler.load_state_dict(snapshot.state["scaler"])
        best = snapshot.state["best"]
        probe = snapshot.state["probe"]
        self.best, self.probe = best and Best(**best), probe and Best(**probe)

    @property
    def gives_probe(self) -> bool:
        """Whether no epoch did better than the probe, so that the run gives the probe's weights."""
        probe, best = self.probe, self.best
        if probe is None:
            return best is not None and best.step == 0
        return best is None or best.rank < probe.rank

    def final_weights(self, warn: Callable[[str], None]) -> dict[str, Tensor] | None:
        """The weights that the run gives after this stage: its best ones, or the probe's where they are better. None as
        from `best_weights`."""
        if self.probe is None or not self.gives_probe or self._store is None:
            return self.best_weights(warn)
        return _stored(self._store.path("probe", 0), warn)

    def best_weights(self, warn: Callable[[str], None]) -> dict[str, Tensor] | None:
        """The weights of `best`, from memory or from the store; None without any validation, or with a warning where
        they are damaged."""
        if self.best is None or self._store is None:
            return None
        if self._waiting is not None:
            return self._waiting
        return _stored(self._store.path("best", self.best.step), warn)

    def _save(
        self,
        store: Store,
        step: int,
        stage: int,
        meters: Meters,
        collapse: CollapseWatch,
        validated: bool,
    ) -> None:
        best = self.best
        if self._waiting is not None and best is not None:
            store.save(Snapshot(best.step, {"network": self._waiting}, {}), kind="best")
            self._waiting = None
        sums, counted = meters.state()
        state: dict[str, Any] = {
            "identity": self._identity,
            "stage": stage,
            "validated": validated,
            "best": best and best._asdict(),
            "probe": self.probe and self.probe._asdict(),
            "meters": counted,
            "collapse": collapse.state(),
            "scaler": self._stepper.runtime.scaler.state_dict(),
        }
        store.save(Snapshot(step, self._stepper.tensors() | {"meters": sums}, state))


def _stored(path: Path, warn: Callable[[str], None]) -> dict[str, Tensor] | None:
    try:
        return read(path).tensors["network"]
    except Damaged as error:
        name, reason = printable(str(path)), printable(error.reason)
        warn(f"The weights {name} are damaged ({reason}); those of the last step are used instead.")
        return None


def same_run(snapshot: Snapshot, identity: dict[str, str]) -> None:
    """Raises ModelError when a checkpoint was written by another run, configuration or class list."""
    if snapshot.state.get("identity") != identity:
        raise ModelError(
            "The checkpoint belongs to another run (configuration, classes or data differ); "
            "put back the files that train wrote, or start a new run with --weights."
        )
