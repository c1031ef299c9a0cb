"""One optimiser step: network, teacher, averaged copy, objective and optimiser."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from nearkin.config import RunConfig
from nearkin.data.mixing import mix
from nearkin.distributed import Runtime
from nearkin.network import Network
from nearkin.objectives import Objective, Stage
from nearkin.teacher import TEACHER_SALT, Teacher, momentum_at
from nearkin.training.microbatch import (
    MicroBatch,
    join,
    leaves,
    linearised,
    mean_loss,
    split,
    statistics_kept,
)
from nearkin.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
    set_lr,
)
from nearkin.types import Batch, Loss, Outputs, Progress


class Transfer:
    """On a GPU the copy travels on a stream of its own, so that it overlaps with the step before, which still runs.

    It does not wait for the host when the batch lies in pinned memory, as the loader leaves it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return self._moved(batch)
        with torch.cuda.stream(self._stream):
            moved = self._moved(batch)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        for each in moved:
            each.record_stream(
                compute
            )  # else its memory could be given away before the step has read it
        return moved

    def _moved(self, batch: Batch) -> Batch:
        return Batch(*(each.to(self._device, non_blocking=True) for each in batch))


class Stepper:
    """Takes optimiser steps. Knows nothing of folders, journals or loaders.

    The configuration is resolved; `network` and `objective` are placed on the runtime's device.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        network: Network,
        objective: Objective,
        steps_per_epoch: int,
        classes: int,
    ) -> None:
        self.config, self.runtime = config, runtime
        self._transfer = Transfer(runtime.device)
        self.network, self.objective = network, objective
        self.steps_per_epoch, self.classes = steps_per_epoch, classes
        self.ema: Teacher | None = None
        self.teacher: Teacher | None = None
        self.optimizer: Optimizer
        self.at_collapse: Loss  # of the last batch of an epoch, for whoever wonders at its end
        self.steps_done = 0

    def begin(self, stage: Stage) -> None:
        """Start a stage: freeze what it does not use, fresh optimiser, teacher and average."""
        config = self.config
        self.stage = stage
        self.network.activate(stage.heads, stage.freeze_backbone or config.freeze_backbone)
        self.ema = Teacher(self.network) if config.ema > 0 else None
        policy = stage.teacher
        self.teacher = Teacher(self.network, batchnorm=policy.batchnorm) if policy else None
        if config.compile:
            for network in [self.network] + ([self.teacher.network] if self.teacher else []):
                network.compile_backbone()
        self.optimizer = build_optimizer(
            self.network,
            config.optimizer,
            lr=float(config.lr),
            weight_decay=float(config.weight_decay),
            momentum=config.momentum,
            nesterov=config.nesterov,
            decay_all=config.decay_all,
            layer_decay=float(config.layer_decay),
        )
        self._wrapped = self.runtime.wrap(self.network)

    def step(self, batch: Batch, progress: Progress, step: int) -> Loss:
        """One optimiser step on this rank's block of global batch number `step`."""
        self.network.train()
        self._set_lr(progress)
        pieces = split(self._place(batch, step), self.config.accumulate)
        coupled = self.stage.coupled and len(pieces) > 1
        take = self._in_two_passes if coupled else self._part_by_part
        loss, whole = take(pieces, progress, step)
        if (step + 1) % self.steps_per_epoch == 0:
            self.at_collapse = self.objective.at_collapse(*whole, progress)
        self._apply()
        self.steps_done = step + 1
        self._follow(whole, progress)
        return loss

    def _part_by_part(
        self, pieces: list[Batch], progress: Progress, step: int
    ) -> tuple[Loss, MicroBatch]:
        """The mean of the parts' losses, each back-propagated at once: exact where no anchor looks at another."""
        parts: list[MicroBatch] = []
        losses: list[Loss] = []
        for number, piece in enumerate(pieces):
            with self.runtime.accumulating(self._wrapped, unfinished=number < len(pieces) - 1):
                part = self._forward(piece, step, number)
                whole = self._gathered(part)
                loss = self.objective(*whole, progress)
                self.runtime.backward(loss.total / len(pieces))
            parts.append(part)
            losses.append(loss)
        return mean_loss(losses), whole if len(pieces) == 1 else self._gathered(join(parts))

    def _in_two_passes(
        self, pieces: list[Batch], progress: Progress, step: int
    ) -> tuple[Loss, MicroBatch]:
        """The loss of the whole batch: outputs first, without a graph; their gradients once; then the weights'."""
        with torch.no_grad(), statistics_kept(self.network):
            block = join([self._forward(p, step, number) for number, p in enumerate(pieces)])
        block = block._replace(student=leaves(block.student))
        whole = self._gathered(block)
        loss = self.objective(*whole, progress)
        loss.total.backward()
        images = len(block.batch.labels)
        for number, piece in enumerate(pieces):
            with self.runtime.accumulating(self._wrapped, unfinished=number < len(pieces) - 1):
                again = self._student(piece, step, number)
                self.runtime.backward(linearised(again, block.student, images, number))
        return loss, whole

    @property
    def lr(self) -> float:
        """The learning rate of the step just taken."""
        return self._lr

    def judged(self) -> Network:
        """The network that validation, `best` and the final model look at."""
        if self.stage.final == "teacher" and self.teacher is not None:
            return self.teacher.network
        return self.network if self.ema is None else self.ema.network

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint must hold to go on from here."""
        tensors = {
            "network": self.network.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.network),
        }
        if self.teacher is not None:
            tensors["teacher"] = self.teacher.state_dict()
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        return tensors

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `tensors` gave, after `begin` of the same stage."""
        self.network.load_state_dict(tensors["network"])
        self.objective.load_state_dict(tensors["objective"])
        load_optimizer_tensors(self.optimizer, self.network, tensors["optimizer"])
        if self.teacher is not None:
            self.teacher.load_state_dict(tensors["teacher"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])

    def _set_lr(self, progress: Progress) -> None:
        config = self.config
        warmup = round(float(config.warmup_epochs) * self.steps_per_epoch)
        factor = lr_factor(
            progress.step,
            steps=progress.steps,
            warmup=min(warmup, progress.steps),
            floor=config.min_lr_ratio,
        )
        self._lr = float(config.lr) * self.stage.lr * factor
        set_lr(self.optimizer, self._lr)

    def _place(self, batch: Batch, step: int) -> Batch:
        config, batch = self.config, self._transfer(batch)
        images, labels, index = batch
        mixup, cutmix = float(config.mixup), float(config.cutmix)
        if mixup == 0 and cutmix == 0:
            return batch
        return Batch(
            *mix(
                images.to(self.runtime.dtype) / 255,
                labels,
                index,
                classes=self.classes,
                mixup=mixup,
                cutmix=cutmix,
                seed=config.seed,
                step=step,
                offset=self.runtime.rank * images.shape[1],
            )
        )

    def _forward(self, batch: Batch, step: int, number: int) -> MicroBatch:
        return MicroBatch(
            batch, self._student(batch, step, number), self._taught(batch, step, number)
        )

    def _student(self, batch: Batch, step: int, number: int) -> Outputs:
        offset = self._offset(batch, number)
        # For draws that are not keyed to a sample; part 0 of the first rank starts from seed + step.
        torch.manual_seed((self.config.seed + step + (offset << 40)) % (1 << 63))
        views = self.stage.student_views
        self.network.key.set(self.config.seed, step, offset, views)
        return self.runtime.forward(self._wrapped, batch.images[:views].flatten(0, 1))

    def _taught(self, batch: Batch, step: int, number: int) -> Outputs | None:
        """What the teacher says, if the stage has one."""
        if self.teacher is None or self.stage.teacher is None:
            return None
        views, own = self.stage.student_views, self.stage.teacher.crop == "own"
        read = (batch.images[views:] if own else batch.images[:views]).flatten(0, 1)
        salted, offset = self.config.seed ^ TEACHER_SALT, self._offset(batch, number)
        self.teacher.network.key.set(salted, step, offset, 1 if own else views)
        with self.runtime.autocast():
            outputs: Outputs = self.teacher(read)
        return outputs

    def _offset(self, batch: Batch, number: int) -> int:
        """The position of a part's first image in the global batch."""
        return (self.runtime.rank * self.config.accumulate + number) * batch.images.shape[1]

    def _gathered(self, part: MicroBatch) -> MicroBatch:
        """The part over all ranks, in the order of the global batch; without the images, which no loss reads."""
        gather, batch = self.runtime.gather, part.batch
        whole = Batch(batch.images, gather(batch.labels), gather(batch.index))
        size = batch.labels.shape[0]
        teacher = None if part.teacher is None else self._rows(part.teacher, size)
        return MicroBatch(whole, self._rows(part.student, size), teacher)

    def _rows(self, outputs: Outputs, size: int) -> Outputs:
        if self.runtime.world_size == 1:
            return outputs
        views = outputs.features.shape[0] // size
        return Outputs(*(None if o is None else self.runtime.gather(o, views) for o in outputs))  # type: ignore[arg-type]

    def _apply(self) -> None:
        self.runtime.step(self.optimizer, self.config.clip_grad)

    def _follow(self, whole: MicroBatch, progress: Progress) -> None:
        """After the optimiser: the teacher, the averaged copy and the bank."""
        with torch.no_grad():
            self.objective.update(*whole)
        if self.teacher is not None and self.stage.teacher is not None:
            momentum = momentum_at(
                self.stage.teacher, progress.step + 1, progress.steps, self.steps_per_epoch
            )
            self.teacher.update(self.network, momentum)
        if self.ema is not None:
            # Until the stage is as long as the average's memory, it is the plain mean.
            self.ema.update(self.network, min(self.config.ema, 1 - 1 / (progress.step + 2)))
