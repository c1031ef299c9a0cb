"""A run at work: parts put together, training, and what is written at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nearkin.data.dataset import Dataset, Split
from nearkin.data.loader import train_loader
from nearkin.data.sampling import TrainOrder
from nearkin.data.transforms import TrainSpec, train_transform
from nearkin.distributed import Runtime
from nearkin.errors import ConfigError, NearkinError
from nearkin.evaluation.evaluator import Evaluator
from nearkin.evaluation.geometry import geometry
from nearkin.evaluation.metrics import summarise, write_predictions
from nearkin.evaluation.model import FORMAT, Description, save_bundle
from nearkin.objectives import Stage
from nearkin.process import StopSignals, handled
from nearkin.training.checkpoint.saver import Saver, same_run
from nearkin.training.checkpoint.store import Snapshot, Store
from nearkin.training.console import Bar
from nearkin.training.defaults import eval_spec
from nearkin.training.loop import Loop, legs
from nearkin.training.metrics_log import Journal
from nearkin.training.prepare import Prepared, Result, drawn, to_result
from nearkin.training.run_folder import locked
from nearkin.training.step import Stepper
from nearkin.types import Batch


class Trainer:
    """Trains one job in one run folder, from its newest checkpoint if there is one."""

    def __init__(self, job: Prepared, runtime: Runtime, folder: Path, *, quiet: bool) -> None:
        self.job, self.runtime, self.folder = job, runtime, folder
        self.config, self.dataset = job.config, job.dataset
        self.steps_per_epoch = len(self.train_split.labels) // int(self.config.batch_size)
        self.journal = Journal(folder) if runtime.is_main else None
        self.quiet = quiet or not runtime.is_main
        self.spec = eval_spec(self.config)
        self.evaluator = Evaluator(
            runtime,
            self.spec,
            batch_size=max(64, int(self.config.batch_size)),
            workers=int(self.config.workers),
        )
        self._assemble()

    @property
    def train_split(self) -> Split:
        return self.dataset.splits["train"]

    def run(self) -> Result:
        """Train to the end, then judge the test split once. Raises Stopped or DivergedError on the way."""
        with locked(self.folder) if self.runtime.is_main else nullcontext():
            return self._run()

    def _run(self) -> Result:
        route = legs(self.stages, int(self.config.epochs), self.steps_per_epoch)
        self.steps = route[-1].last
        level = self.config.log_level
        quiet, silent = self.quiet or level != "info", self.quiet or level == "error"
        signals = StopSignals()
        with Bar(self.steps, quiet=quiet, silent=silent) as bar, handled(signals.ask):
            self.bar = bar
            self._say(self._summary())
            snapshot = self._snapshot()
            loop = Loop(
                self.config,
                self.runtime,
                self.stepper,
                self.saver,
                self.journal,
                loader=self._loader,
                validate=self._validate,
                told=bar.told,
                warn=self._warn,
            )
            try:
                return self._finish(loop.run(route, snapshot, signals))
            except Exception as error:
                self._ended(error)
                raise

    def _assemble(self) -> None:
        network, objective = self.job.built.network, self.job.built.objective
        self.runtime.place(network)
        self.runtime.place(objective)
        if self.config.memory_format != "auto":
            network.set_memory_format(self.config.memory_format)
        if self.runtime.world_size > 1:
            from nearkin.network import synchronise_batchnorm

            synchronise_batchnorm(network, self.runtime.device.type)
        if self.config.class_weights == "balanced":
            objective.weigh_classes(
                balanced(self.train_split, self.dataset).to(self.runtime.device)
            )
        self.stages = objective.stages()
        self.stepper = Stepper(
            self.config,
            self.runtime,
            network,
            objective,
            self.steps_per_epoch,
            len(self.dataset.classes),
        )
        self.store = Store(self.folder / "checkpoints")
        self.saver = Saver(
            self.store if self.runtime.is_main else None,
            self.job.identity,
            self.config.save_minutes,
            self.stepper,
        )

    def _snapshot(self) -> Snapshot | None:
        """The newest checkpoint, on every process; the journal is cut back to it."""
        snapshot = self.store.load_newest(self._warn)
        if snapshot is not None:
            same_run(snapshot, self.job.identity)
        if self.journal is not None:
            self.journal.cut_back(snapshot.step if snapshot else 0)
            self.store.cut_back(snapshot.step if snapshot else 0)
        if snapshot is not None:
            self._say(f"continuing at step {snapshot.step}")
        return snapshot

    def _loader(self, stage: Stage, first: int, last: int) -> Iterator[Batch]:
        config = self.config
        transform = train_transform(TrainSpec.model_validate(config, from_attributes=True))
        order = TrainOrder(
            len(self.train_split.labels),
            seed=config.seed,
            batch_size=int(config.batch_size),
            first=first,
            last=last,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            draw=drawn(config, self.train_split.labels),
        )
        return train_loader(
            self.train_split,
            transform,
            order,
            views=stage.views,
            seed=config.seed,
            workers=int(config.workers),
            pin_memory=self.runtime.device.type == "cuda",
        )

    def _validate(self) -> dict[str, Any] | None:
        split = self.dataset.splits.get("val")
        if split is None:
            return None
        network = self.stepper.judged()
        if not network.classifies:
            value, embeddings = self.evaluator.knn(network, self.train_split, split)
            found: dict[str, Any] = {"metric": "val kNN", "value": value, "knn": value}
        else:
            predictions, embeddings = self.evaluator.look(network, split)
            summary = summarise(predictions, self.dataset.classes)
            value, loss = summary["top1"], summary["log_loss"]
            found = {"metric": "val top-1", "value": value, "top1": value, "log_loss": loss}
        return found | geometry(embeddings, torch.from_numpy(split.labels))

    def _finish(self, step: int) -> Result:
        network = self.stepper.judged()
        weights = self.runtime.share(self.saver.best_weights())
        if weights is not None:
            network.load_state_dict(weights)
        metrics: dict[str, Any] = {}
        judged = self.dataset.splits.get("test", self.dataset.splits.get("val"))
        if judged is not None:
            predictions = self.evaluator.predictions(network, judged)
            metrics = {"split": judged.name} | summarise(predictions, self.dataset.classes)
            if self.runtime.is_main:
                write_predictions(
                    self.folder / "predictions.csv",
                    predictions,
                    [judged.images.name(row) for row in range(len(judged.labels))],
                    self.dataset.classes,
                )
        if self.journal is not None:
            description = Description(
                format=FORMAT,
                nearkin=version("nearkin"),
                spec=self.job.built.spec,
                transform=self.spec,
                heads=self.stages[-1].heads,
                metrics=metrics,
            )
            save_bundle(self.folder, description, network.state_dict())
            best = self.saver.best
            self.journal.status(
                "finished",
                step=step,
                steps=self.steps,
                epoch=int(self.config.epochs),
                best=best and best._asdict(),
            )
            self.journal.log(f"finished at step {step}")
        return to_result(self.folder, metrics)

    def _ended(self, error: Exception) -> None:
        if self.journal is not None:
            code = error.code if isinstance(error, NearkinError) else 1
            state = {75: "stopped", 6: "diverged"}.get(code, "failed")
            best = self.saver.best
            self.journal.log(f"{state}: {error}")
            step = self.stepper.steps_done
            epoch = step // max(1, self.steps_per_epoch)
            self.journal.status(
                state,
                step=step,
                steps=self.steps,
                epoch=epoch,
                best=best and best._asdict(),
                message=str(error),
            )

    def _say(self, text: str) -> None:
        self.bar.say(text)
        if self.journal is not None:
            self.journal.log(text)

    def _warn(self, text: str) -> None:
        self.bar.warn(text)
        if self.journal is not None:
            self.journal.log(f"warning: {text}")

    def _summary(self) -> str:
        """What is about to happen, in one line."""
        config, ranks = self.config, self.runtime.world_size
        images = ", ".join(f"{len(s.labels)} {name}" for name, s in self.dataset.splits.items())
        weights = sum(p.numel() for p in self.job.built.network.parameters()) / 1e6
        share = f" ({int(config.batch_size) // ranks} per process)" if ranks > 1 else ""
        return (
            f"{self.dataset.name}: {images} images of {len(self.dataset.classes)} classes | "
            f"{config.objective} on {config.model}, {config.image_size} px, {weights:.1f} M weights | "
            f"{config.epochs} epochs of {self.steps_per_epoch} x {config.batch_size}{share} | "
            f"{config.precision} on {config.device}, {config.threads} thread(s) | {self.folder}"
        )


def balanced(split: Split, dataset: Dataset) -> torch.Tensor:
    """Class weights N / (C n_c), so that their mean over the training images is 1; classes without images 0."""
    counts = torch.bincount(torch.as_tensor(split.labels), minlength=len(dataset.classes)).float()
    if not bool(counts.sum()):
        raise ConfigError("--class-weights needs training images.")
    return torch.where(counts > 0, counts.sum() / (len(counts) * counts.clamp(min=1)), 0.0)
