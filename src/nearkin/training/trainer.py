"""A training run: puts the parts together, trains, evaluates the test split and writes the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nearkin.data.dataset import Split
from nearkin.distributed import Runtime
from nearkin.errors import Stopped, counted, first_line, printable
from nearkin.evaluation.geometry import geometry
from nearkin.evaluation.kin import Kin, collect, write_kin
from nearkin.evaluation.metrics import summarise, top1_and_log_loss, write_predictions, write_tables
from nearkin.evaluation.model import FORMAT, Description, save_bundle
from nearkin.evaluation.report_data import Seen, gather, see
from nearkin.network import Network
from nearkin.objectives import Stage
from nearkin.process import stop_signals_recorded
from nearkin.training import first_batch
from nearkin.training.batches import batch_keys, train_batches
from nearkin.training.checkpoint.saver import Saver, same_run
from nearkin.training.checkpoint.snapshot import Snapshot
from nearkin.training.checkpoint.store import Store
from nearkin.training.console import Bar
from nearkin.training.loggers import Loggers
from nearkin.training.loop import Loop, legs, validation_interval
from nearkin.training.metrics_log import Journal
from nearkin.training.prepare import Prepared, origin
from nearkin.training.probe import refit
from nearkin.training.report import write_report
from nearkin.training.run_folder import CHECKPOINTS, locked
from nearkin.training.step import Stepper
from nearkin.types import Batch, Predictions, Result

WORTH_TSNE = 60.0  # seconds of training


class Trainer:
    """Trains in one run folder, from its newest checkpoint if there is one."""

    def __init__(
        self,
        prepared: Prepared,
        runtime: Runtime,
        folder: Path,
        *,
        quiet: bool,
        report: bool = True,
    ) -> None:
        self.prepared, self.runtime, self.folder = prepared, runtime, folder
        self.settings, self.dataset = prepared.settings, prepared.dataset
        self.train_split = self.dataset.splits["train"]
        self.steps_per_epoch = len(self.train_split.labels) // self.settings.batch_size
        self.journal = Journal(folder, writes=runtime.is_main)
        self.quiet = quiet or not runtime.is_main
        self.reports, self.started = report, time.monotonic()
        self.evaluator = prepared.evaluator
        self._assemble()

    def run(self) -> Result:
        """Train to the end, then evaluate the test split once. Raises Stopped or DivergedError."""
        with locked(self.folder, quiet=self.quiet) if self.runtime.is_main else nullcontext():
            return self._run()

    def _run(self) -> Result:
        route = legs(self.stages, self.settings.epochs, self.steps_per_epoch)
        level = self.settings.log_level
        quiet, silent = self.quiet or level != "info", self.quiet or level == "error"
        images = self.settings.batch_size
        bar = Bar(route[-1].last, images, self.journal, quiet=quiet, silent=silent)
        with bar, stop_signals_recorded():
            bar.say(self._summary())
            snapshot = self._snapshot(bar)
            self.loop = Loop(
                self.settings,
                self.runtime,
                self.stepper,
                self.saver,
                route,
                self.journal,
                bar,
                loader=self._loader,
                listed=self._listed,
                validate=self._validate,
                interval=validation_interval(self.dataset, self.settings.epochs),
                probed=self.settings.probe,
            )
            self.runtime.failures.callback = self._record_end
            if snapshot is None and self.runtime.is_main and route[-1].last > 0:
                self._draw_first_batch(bar)
            with self._logging(bar) as loggers:
                result = self._finish(self.loop.run(snapshot))
                loggers.close(result.metrics)
            return result

    def _draw_first_batch(self, bar: Bar) -> None:
        try:
            first_batch.draw(self.folder, self.settings, self.train_split, self.stages[0])
        except Exception as error:  # a picture is no reason to end a run
            reason = f"{type(error).__name__}: {first_line(error)}"
            bar.warn(f"The first batch cannot be drawn ({reason}); training goes on.")

    @contextmanager
    def _logging(self, bar: Bar) -> Iterator[Loggers]:
        """The loggers of `--log`, which get the journal's records within the block."""
        log = self.settings.log if self.runtime.is_main else None
        loggers = Loggers(log, bar.say, bar.warn)
        if log:
            loggers.start(self.settings.flat(), self.folder, self.journal.records())
            self.journal.mirror = loggers.record
        try:
            yield loggers
        finally:
            self.journal.mirror = None
            loggers.close()

    def _assemble(self) -> None:
        network, objective = self.prepared.built.network, self.prepared.built.objective
        classes = len(self.dataset.classes)
        if self.settings.class_weights == "balanced":
            weights = balanced_weights(self.train_split, classes)
            objective.weigh_classes(weights.to(self.runtime.device))
        self.stages = objective.stages()
        self.stepper = Stepper(
            self.settings, self.runtime, network, objective, self.steps_per_epoch, classes
        )
        self.store = Store(self.folder / CHECKPOINTS)
        self.saver = Saver(
            self.store if self.runtime.is_main else None,
            self.prepared.identity,
            self.settings.save_minutes,
            self.stepper,
        )

    def _snapshot(self, bar: Bar) -> Snapshot | None:
        """The newest checkpoint that the first process can read, on all of them; the journal is cut back to it."""
        snapshot = self.store.load_newest(bar.warn) if self.runtime.is_main else None
        step = self.runtime.share(snapshot and snapshot.step)
        if step is not None and not self.runtime.is_main:
            snapshot = self.store.load(step)
        if snapshot is not None:
            same_run(snapshot, self.prepared.identity)
            bar.say(f"continuing at step {snapshot.step}")
        if self.runtime.is_main:
            validated = snapshot is None or snapshot.state.get("validated", True)
            self.journal.cut_back(snapshot.step if snapshot else -1, validated=validated)
            self.store.cut_back(snapshot.step if snapshot else 0)
        return snapshot

    def _loader(self, stage: Stage, first: int, last: int) -> Iterator[Batch]:
        views, split = stage.views, self.train_split
        return train_batches(
            self.settings, split, self.runtime, views=views, first=first, last=last
        )

    def _listed(self, step: int) -> dict[str, list[int]]:
        rows = [key.row for key in batch_keys(self.settings, self.train_split, step)]
        return {"index": rows, "labels": self.train_split.labels[rows].tolist()}

    def _validate(self) -> dict[str, Any] | None:
        split = self.dataset.splits.get("val")
        if split is None:
            return None
        network = self.stepper.eval_network()
        if not network.classifies:
            value, embeddings = self.evaluator.knn(network, self.train_split, split)
            found: dict[str, Any] = {"metric": "val kNN", "value": value, "knn": value}
        else:
            predictions, embeddings = self.evaluator.predictions_and_embeddings(network, split)
            value, loss = top1_and_log_loss(predictions)
            found = {"metric": "val top-1", "value": value, "top1": value, "log_loss": loss}
        return found | geometry(embeddings, torch.from_numpy(split.labels))

    def _finish(self, step: int) -> Result:
        network = self.stepper.eval_network()
        weights = self.runtime.share(self.saver.final_weights(self.loop.bar.warn))
        if weights is not None:
            network.load_state_dict(weights)
        if weights is not None and step > 0 and self.saver.gives_probe:
            self.loop.bar.say("no epoch did better than the probe, so the result is the probe")
        if self.settings.refit:
            self._refit(network, step)
        metrics: dict[str, Any] = {}
        looked: tuple[Predictions, Seen] | None = None
        split = self.dataset.splits.get("test", self.dataset.splits.get("val"))
        if split is not None:
            looked = predictions, _ = see(self.evaluator, network, split)
            found = summarise(predictions, self.dataset.classes)
            metrics = {"split": split.name} | found.totals()
            if self.runtime.is_main:
                write_tables(self.folder, split.name, found)
                write_predictions(
                    self.folder / "predictions.csv",
                    predictions,
                    [split.images.name(row) for row in range(len(split.labels))],
                    self.dataset.classes,
                )
        objective = self.prepared.built.objective
        kin, temperature = collect(network, objective, self.dataset, self.evaluator, self.runtime)
        if self.runtime.is_main:
            write_kin(self.folder, kin)
            description = Description(
                format=FORMAT,
                nearkin=version("nearkin"),
                spec=self.prepared.built.spec,
                transform=self.evaluator.spec,
                heads=self.stages[-1].heads,
                metrics=metrics,
                temperature=temperature,
            )
            save_bundle(self.folder, description, network.state_dict())
        self.loop.status("finished", step, self.settings.epochs)
        self.journal.log(f"finished at step {step}")
        if self.reports and self.runtime.is_main:
            self._report(looked, kin, temperature)
        return Result.of(self.folder, metrics)

    def _report(
        self, looked: tuple[Predictions, Seen] | None, kin: Kin, temperature: float | None
    ) -> None:
        """Write the page; what goes wrong there is a warning, since the run is finished and saved.

        t-SNE takes some seconds, which only a training of a minute is worth.
        """
        if looked is None:
            self.loop.bar.say("no report: there is neither a test nor a validation split")
            return
        with_tsne = time.monotonic() - self.started >= WORTH_TSNE
        try:
            data = gather(*looked, kin, self.train_split, temperature, with_tsne=with_tsne)
            write_report(self.folder, data)
        except Exception as error:  # nothing here may fail a finished run
            run = printable(str(self.folder))
            self.loop.bar.warn(f"there is no report: {first_line(error)}; try nearkin report {run}")

    def _refit(self, network: Network, step: int) -> None:
        """Give the classifier a logistic regression on the final features, unless validation says it is worse."""
        before, trained = self._validate(), copy.deepcopy(network.state_dict())
        heads = self.prepared.built.objective.heads
        most = self.settings.probe_images
        probe = refit(network, heads, self.dataset, self.evaluator, self.runtime, most=most)
        after = self._validate()
        kept = before is None or after is None or _rank(after) > _rank(before)
        if not kept:
            network.load_state_dict(trained)
        values: dict[str, Any] = {"strength": probe.strength, "kept": kept}
        if before is not None and after is not None:
            values |= {"before": before["top1"], "value": after["top1"]}
            self.loop.bar.say(
                f"classifier fitted anew: val top-1 {100 * after['top1']:.2f} %, trained "
                f"{100 * before['top1']:.2f} %; the {'new' if kept else 'trained'} one is used"
            )
        self.journal.record("refit", stage=self.stages[-1].name, step=step, epoch=0, **values)

    def _record_end(self, message: str, code: int) -> None:
        """Record the error that ends the run, of this process or another."""
        state = "diverged" if self.loop.diverged else "failed"
        state = "stopped" if code == Stopped.code else state
        self.journal.log(f"{state}: {message}")
        step = self.stepper.steps_done
        self.loop.status(state, step, step // max(1, self.steps_per_epoch), message)

    def _summary(self) -> str:
        """The run in one line."""
        settings, ranks = self.settings, self.runtime.world_size
        images = ", ".join(f"{len(s.labels)} {name}" for name, s in self.dataset.splits.items())
        weights = sum(p.numel() for p in self.prepared.built.network.parameters()) / 1e6
        share = f" ({settings.batch_size // ranks} per process)" if ranks > 1 else ""
        return (
            f"{self.dataset.name}: {images} images of {len(self.dataset.classes)} classes | "
            f"{settings.objective} on {settings.model}, {settings.image_size} px, {weights:.1f} M weights, "
            f"{origin(settings)} | "
            f"{counted(settings.epochs, 'epoch')} of {self.steps_per_epoch} x {settings.batch_size}{share} | "
            f"{settings.precision} on {settings.device}, {counted(settings.threads, 'thread')} | {self.folder}"
        )


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    """Higher is better, as for the best epoch."""
    return found["top1"], -found["log_loss"]


def balanced_weights(split: Split, classes: int) -> torch.Tensor:
    """Class weights N / (C n_c), so that their mean over the training images is 1; classes without images 0."""
    counts = torch.bincount(torch.as_tensor(split.labels), minlength=classes).float()
    return torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
