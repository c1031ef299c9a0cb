"""When a run is saved, and what a saved run holds."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from torch import Tensor

from nearkin.errors import ModelError
from nearkin.files import SaveFailed
from nearkin.training.checkpoint.store import Snapshot, Store
from nearkin.training.metrics_log import Meters
from nearkin.training.step import Stepper

SHARE = 0.05  # of the time elapsed may go into saving at the ends of epochs
FAILURES = 3  # in a row, until a run that cannot save stops


class Best(NamedTuple):
    """The best weights of the current stage: its validation value, and the step after which it was measured."""

    value: float
    step: int


class Saver:
    """Saves every `minutes`, at the ends of stages, and at ends of epochs while that stays cheap.

    The best weights wait in memory until the next checkpoint, which refers to them.
    Ranks other than the first keep the best value but neither its weights nor files.
    """

    def __init__(
        self, store: Store | None, identity: dict[str, str], minutes: float, stepper: Stepper
    ) -> None:
        self.best: Best | None = None
        self._store, self._identity, self._learner = store, identity, stepper
        self._interval = minutes * 60
        self._began = self._last = time.monotonic()
        self._spent = self._cost = 0.0
        self._failures = 0
        self._waiting: dict[str, Tensor] | None = None

    def consider(self, value: float, step: int) -> bool:
        """Whether `value` is the best so far; then its weights are kept.

        The latest wins a tie, as its learning rate is the lowest: with few validation images the best value is often
        reached early, by weights that are worse on others.
        """
        if self.best is not None and value < self.best.value:
            return False
        self.best = Best(value, step)
        if self._store is not None:
            weights = self._learner.eval_network().state_dict()
            self._waiting = {name: t.detach().cpu().clone() for name, t in weights.items()}
        return True

    def forget_best(self) -> None:
        """A new stage has a best of its own."""
        self.best, self._waiting = None, None

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time for a checkpoint (asked on the saving rank only)."""
        now = time.monotonic()
        if now - self._last >= self._interval:
            return True
        return epoch_ended and self._spent + self._cost <= SHARE * (now - self._began)

    def save(self, step: int, stage: int, meters: Meters, collapse: dict[str, Any]) -> str | None:
        """Publish a checkpoint of this moment. Returns a warning when the disk refused it.

        collapse: state of the `CollapseWatch`.
        Raises SaveFailed after three refusals in a row, DivergedError when a weight is not finite.
        """
        if self._store is None:
            return None
        started = time.monotonic()
        try:
            self._save(self._store, step, {"stage": stage, "collapse": collapse}, meters)
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

    def restore(self, snapshot: Snapshot, meters: Meters) -> None:
        """Take over a snapshot, after the stepper has begun the snapshot's stage."""
        self._learner.load(snapshot.tensors)
        meters.load(snapshot.tensors["meters"], snapshot.state["meters"])
        self._learner.runtime.load_scaler_state(snapshot.state["scaler"])
        best = snapshot.state["best"]
        self.best = None if best is None else Best(best["value"], best["step"])

    def best_weights(self) -> dict[str, Tensor] | None:
        """The weights of `best`, from memory or from the store; None without any validation."""
        if self.best is None or self._store is None:
            return None
        if self._waiting is not None:
            return self._waiting
        path = self._store.path("best", self.best.step)
        return self._store.load(path).tensors["network"]

    def _save(self, store: Store, step: int, place: dict[str, Any], meters: Meters) -> None:
        if self._waiting is not None and self.best is not None:
            store.save(Snapshot(self.best.step, {"network": self._waiting}, {}), kind="best")
            self._waiting = None
        sums, counted = meters.state()
        state: dict[str, Any] = place | {
            "identity": self._identity,
            "best": None if self.best is None else self.best._asdict(),
            "meters": counted,
            "scaler": self._learner.runtime.scaler_state(),
        }
        store.save(Snapshot(step, self._learner.tensors() | {"meters": sums}, state))


def same_run(snapshot: Snapshot, identity: dict[str, str]) -> None:
    """Raises ModelError when a checkpoint was written by another run, configuration or class list."""
    if snapshot.state.get("identity") != identity:
        raise ModelError(
            "The checkpoint belongs to another run (configuration, classes or data differ); "
            "put back the files that train wrote, or start a new run with --weights."
        )
