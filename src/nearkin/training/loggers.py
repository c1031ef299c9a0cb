"""`--log`: the records of `metrics.jsonl` in TensorBoard, Weights & Biases and MLflow too. Imports no torch.

Each logger has a thread, so that training never waits for a disk or a network. A logger that fails is left out for the
rest of the run, with one warning. A new one is a class with four methods, in LOGGERS here and in `nearkin.catalogue`.
"""

from __future__ import annotations

import math
import os
import queue
import shlex
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

from nearkin.errors import ConfigError, first_line, printable, to_install
from nearkin.files import own_folder, write_atomic

LONGEST_QUEUE = 10_000  # records that wait for a logger before it is given up
PATIENCE = 20.0  # seconds that the end of a run waits for loggers; Slurm kills at 30
PLACE = frozenset({"stage", "step", "epoch"})  # of a record, no value of its own


class Point(NamedTuple):
    """A record as loggers get it. time: seconds since 1970. values: by `KIND/NAME`, all finite."""

    step: int
    time: float
    values: dict[str, float]


class Logger(Protocol):
    """What a logger is. Any method may raise any error; then only `close` is called.

    The constructor imports its package, in the main thread: loader workers are forked later, and a fork in the middle
    of an import would leave the module's lock held in the worker.
    """

    def start(self, settings: Mapping[str, Any], folder: Path) -> str:
        """Begin, or go on with what an earlier process of this run has begun. Returns where a person sees it.

        settings: of the run, flat. folder: of the run.
        """

    def scalars(self, point: Point) -> None:
        """One record. Those of earlier processes of this run come first, from the first step on."""

    def summary(self, values: Mapping[str, float]) -> None:
        """The metrics of the finished model."""

    def close(self, finished: bool) -> None:
        """The last call."""


class TensorBoard:
    """One event file in `RUN/tensorboard`, written anew from the journal by each process of a run: what was logged
    after its last checkpoint is gone, and the rest has the same bytes. Its name holds no host, unlike torch's."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._made_event, self._made_summary = Event, Summary
        self._made_text, self._made_writer = text_pb, RecordWriter

    def start(self, settings: Mapping[str, Any], folder: Path) -> str:
        place = folder / "tensorboard"
        own_folder(place)
        path = place / "events.out.tfevents.nearkin"
        path.unlink(missing_ok=True)  # nothing is written to what a link names
        file = path.open("xb")
        self._writer, self._last = self._made_writer(file), Point(0, 0.0, {})
        self._event(0.0, file_version="brain.Event:2")
        rows = "".join(
            f"    {name}: {printable(str(value))}\n" for name, value in settings.items()
        )  # Markdown's code
        self._event(0.0, summary=self._made_text("settings", rows))
        return f"tensorboard --logdir {shlex.quote(str(place))}"

    def scalars(self, point: Point) -> None:
        values = [{"tag": n, "simple_value": v} for n, v in point.values.items()]
        self._event(point.time, step=point.step, summary=self._made_summary(value=values))
        self._last = point

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(self._last._replace(values=dict(values)))

    def close(self, finished: bool) -> None:  # noqa: ARG002
        self._writer.close()

    def _event(self, time: float, **fields: Any) -> None:
        event = self._made_event(wall_time=time, **fields)
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class WeightsAndBiases:
    """A run of W&B; its id is kept in `RUN/wandb.id`, and a resumed run goes on after the last step that W&B has.

    The project is $WANDB_PROJECT, else nearkin; `WANDB_MODE=offline` keeps the files in `RUN/wandb`.
    """

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def start(self, settings: Mapping[str, Any], folder: Path) -> str:
        known = folder / "wandb.id"
        if not known.exists():
            write_atomic(known, uuid.uuid4().hex[:12].encode())
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nearkin"),
            id=known.read_text().strip(),
            name=folder.resolve().name,
            resume="allow",
            config=dict(settings),
            dir=str(folder),
            # stderr is the bar's, and nobody waits at a prompt for the key.
            settings=self._wandb.Settings(console="off", silent=True, login_timeout=10),
        )
        self._first = self._run.step  # of a resumed run, the step after the last one
        return str(folder / "wandb" if self._run.offline else self._run.url)

    def scalars(self, point: Point) -> None:
        if point.step >= self._first:
            self._run.log(point.values, step=point.step)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of the experiment $MLFLOW_EXPERIMENT_NAME, else nearkin, at $MLFLOW_TRACKING_URI; its id is kept in
    `RUN/mlflow.id`. A resumed run adds to each metric what comes after its last step."""

    def __init__(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._connect, self._metric, self._param = MlflowClient, Metric, Param

    def start(self, settings: Mapping[str, Any], folder: Path) -> str:
        self._client, self._last = self._connect(), Point(0, 0.0, {})
        self._steps: dict[str, int] = {}  # by metric, the last that the server has
        known = folder / "mlflow.id"
        if known.exists():
            self._id, self._resumed = known.read_text().strip(), True
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "nearkin"))
            run = self._client.create_run(experiment, run_name=folder.resolve().name)
            self._id, self._resumed = str(run.info.run_id), False
            write_atomic(known, self._id.encode())
            texts = {name: str(value)[:500] for name, value in settings.items()}
            params = [self._param(name, text) for name, text in texts.items()]
            for first in range(0, len(params), 100):  # the most that a request may have
                self._client.log_batch(self._id, params=params[first : first + 100])
        return f"MLflow run {self._id}"

    def scalars(self, point: Point) -> None:
        new = {n: v for n, v in point.values.items() if point.step > self._last_step(n)}
        milliseconds = round(1000 * point.time)
        metrics = [
            self._metric(name, value, milliseconds, point.step) for name, value in new.items()
        ]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        self._last = point

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(self._last._replace(values=dict(values)))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _last_step(self, name: str) -> int:
        if name not in self._steps:
            history = self._client.get_metric_history(self._id, name) if self._resumed else []
            self._steps[name] = max((metric.step for metric in history), default=-1)
        return self._steps[name]


LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def check_installed(log: str | None) -> None:
    """Raises ConfigError when the package of a logger is missing. log: names, separated by commas."""
    missing = [name for name in names(log) if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--log {','.join(missing)} needs packages; {to_install(*missing)}.")


def names(log: str | None) -> list[str]:
    """The names in the value of `--log`."""
    return log.split(",") if log else []


def point(record: Mapping[str, Any]) -> Point:
    """The numbers of a record of `metrics.jsonl`; texts, lists, truth values and what is not finite are left out."""
    values = {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if name not in PLACE and isinstance(value, int | float) and not isinstance(value, bool)
    }
    written = datetime.fromisoformat(record["clock"]["time"]).timestamp()
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return Point(int(record["step"]), written, finite)


class Loggers:
    """The loggers of a run: `start`, then `record` for each record, then `close`.

    log: names, separated by commas. say, warn: for one line to a person, called in the thread of the caller only.
    """

    def __init__(
        self, log: str | None, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self._say, self._warn = say, warn
        self._senders = [_Sender(name) for name in names(log)]

    def start(
        self, settings: Mapping[str, Any], folder: Path, past: Sequence[Mapping[str, Any]]
    ) -> None:
        """past: the records of the run so far."""
        for sender in self._senders:
            sender.begin(settings, folder, past)

    def record(self, record: Mapping[str, Any]) -> None:
        """Send a record of the journal."""
        if self._senders:
            made = point(record)
            for sender in self._senders:
                sender.send(made)
            self._report()

    def close(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Wait for the loggers, 20 s at most. metrics: of the finished model; None when the run did not finish."""
        numbers = {f"final/{n}": v for n, v in (metrics or {}).items() if isinstance(v, float)}
        begun = [sender for sender in self._senders if sender.ident is not None]
        for sender in begun:
            sender.end(None if metrics is None else numbers)
        end = time.monotonic() + PATIENCE
        for sender in begun:
            sender.join(max(0.0, end - time.monotonic()))
            if sender.is_alive():
                sender.failure = f"it has not taken everything within {PATIENCE:g} s"
        self._report()
        self._senders = []

    def _report(self) -> None:
        for sender in self._senders:
            if sender.where:
                self._say(f"log: {sender.where}")
                sender.where = ""
            if sender.failure and not sender.reported:
                sender.reported = True
                self._warn(
                    f"--log {sender.name} failed and is left out ({sender.failure}); metrics.jsonl has all records."
                )


class _Sender(Thread):
    """Calls one logger. `where` and `failure` are texts for a person, empty until there is something to say."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)  # a hanging network must not keep the process
        self._logger: Logger
        self._waiting: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.where = self.failure = ""
        self.reported = False

    def begin(
        self, settings: Mapping[str, Any], folder: Path, past: Sequence[Mapping[str, Any]]
    ) -> None:
        def first() -> None:
            self.where = self._logger.start(settings, folder)
            for record in past:
                self._logger.scalars(point(record))

        try:
            self._logger = LOGGERS[self.name]()
        except Exception as error:  # of a foreign package
            self._fail(error)
        self._waiting.put(first)
        self.start()

    def send(self, made: Point) -> None:
        if self._waiting.qsize() > LONGEST_QUEUE:
            self.failure = self.failure or f"{LONGEST_QUEUE} records wait for it"
        if not self.failure:
            self._waiting.put(lambda: self._logger.scalars(made))

    def end(self, summary: Mapping[str, float] | None) -> None:
        """summary: of a finished run, else None."""
        if summary:
            self._waiting.put(lambda: self._logger.summary(summary))
        self._waiting.put(lambda: self._logger.close(summary is not None))
        self._waiting.put(None)

    def run(self) -> None:
        while (call := self._waiting.get()) is not None:
            if self.failure:
                continue
            try:
                call()
            except BaseException as error:  # of a foreign package, which may even call sys.exit
                self._fail(error)
        if self.failure:
            with suppress(BaseException):
                self._logger.close(finished=False)

    def _fail(self, error: BaseException) -> None:
        text = first_line(error) if isinstance(error, Exception) else ""
        self.failure = printable(f"{type(error).__name__}: {text}")
