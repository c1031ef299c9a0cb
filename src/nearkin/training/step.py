"""One optimiser step: network, teacher, averaged copy, objective and optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nearkin.data.mixing import mix
from nearkin.distributed import Runtime
from nearkin.network import Network
from nearkin.objectives import Objective, Stage
from nearkin.settings import Settings
from nearkin.teacher import TEACHER_SALT, Teacher, momentum_at
from nearkin.training import microbatch, optim
from nearkin.training.checks import check_learns
from nearkin.training.microbatch import MicroBatch
from nearkin.types import Batch, Loss, Outputs, Progress


class Transfer:
    """Copies batches to the device; on a GPU on a stream of its own, so that the copy overlaps with the previous step.

    The host does not wait for the copy of a batch in pinned memory, which the loader gives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return self._copy(batch)
        with torch.cuda.stream(self._stream):
            moved = self._copy(batch)
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        for each in moved:
            each.record_stream(compute)  # else its memory may be reused before the step has read it
        return moved

    def _copy(self, batch: Batch) -> Batch:
        return Batch(*(each.to(self._device, non_blocking=True) for each in batch))


class Stepper:
    """Runs optimiser steps: forward passes of student and teacher, loss, backward pass, updates.

    `network` and `objective` are on the runtime's device. classes: C, for mixed labels.
    """

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        network: Network,
        objective: Objective,
        steps_per_epoch: int,
        classes: int,
    ) -> None:
        self.settings, self.runtime = settings, runtime
        self._transfer = Transfer(runtime.device)
        self.network, self.objective = network, objective
        self.steps_per_epoch, self.classes = steps_per_epoch, classes
        self.ema: Teacher | None = None
        self.teacher: Teacher | None = None
        self.optimizer: Optimizer
        self.at_collapse: Loss  # of constant embeddings, for the last batch of an epoch
        self.steps_done = 0
        self.lr = 0.0  # of the step just taken

    def begin(self, stage: Stage) -> None:
        """Start a stage: freeze what it does not train; new optimiser, teacher and average."""
        settings = self.settings
        self.stage = stage
        self.network.activate(stage.heads, stage.freeze_backbone or settings.freeze_backbone)
        check_learns(stage, [self.network])
        self.network.train()
        # A stage that gives its teacher has an average already.
        averaged = settings.ema > 0 and stage.final == "student"
        self.ema = Teacher(self.network) if averaged else None
        policy = stage.teacher
        self.teacher = Teacher(self.network, batchnorm=policy.batchnorm) if policy else None
        if settings.compile:
            for network in [self.network] + ([self.teacher.network] if self.teacher else []):
                network.compile_backbone()
        self.optimizer = optim.build_optimizer(self.network, settings)
        self._wrapped = self.runtime.wrap(self.network)

    def step(self, batch: Batch, progress: Progress, step: int) -> Loss:
        """One optimiser step on this rank's block of global batch number `step`."""
        if not self.network.training:  # it visits every module, which takes milliseconds
            self.network.train()
        self._set_lr(progress)
        pieces = microbatch.split(self._prepare(batch, step), self.settings.accumulate)
        coupled = self.stage.coupled and len(pieces) > 1
        run = self._two_passes if coupled else self._one_pass
        loss, whole = run(pieces, progress, step)
        if (step + 1) % self.steps_per_epoch == 0:
            self.at_collapse = self.objective.at_collapse(*whole, progress)
        self.runtime.step(self.optimizer, self.settings.clip_grad)
        self.steps_done = step + 1
        self._update_averages(whole, progress)
        return loss

    def _one_pass(
        self, pieces: list[Batch], progress: Progress, step: int
    ) -> tuple[Loss, MicroBatch]:
        """The mean of the parts' losses, each back-propagated at once: exact where anchors are independent."""
        parts: list[MicroBatch] = []
        losses: list[Loss] = []
        for number, piece in enumerate(pieces):
            with self.runtime.accumulating(self._wrapped, unfinished=number < len(pieces) - 1):
                part = self._forward(piece, step, number)
                whole = self._gather(part)
                loss = self.objective.forward(*whole, progress)  # labels of a data set are in range
                self.runtime.backward(loss.total / len(pieces))
            parts.append(part)
            losses.append(loss)
        whole = whole if len(pieces) == 1 else self._gather(microbatch.join(parts))
        return microbatch.mean_loss(losses), whole

    def _two_passes(
        self, pieces: list[Batch], progress: Progress, step: int
    ) -> tuple[Loss, MicroBatch]:
        """The loss of the whole batch: outputs without a graph, their gradients, then those of the weights."""
        with torch.no_grad(), microbatch.statistics_kept(self.network):
            parts = [self._forward(piece, step, number) for number, piece in enumerate(pieces)]
            block = microbatch.join(parts)
        block = block._replace(student=microbatch.leaves(block.student))
        whole = self._gather(block)
        loss = self.objective.forward(*whole, progress)
        torch.autograd.backward(loss.total)
        images = len(block.batch.labels)
        for number, piece in enumerate(pieces):
            with self.runtime.accumulating(self._wrapped, unfinished=number < len(pieces) - 1):
                again = self._student_outputs(piece, step, number)
                self.runtime.backward(microbatch.linearised(again, block.student, images, number))
        return loss, whole

    def eval_network(self) -> Network:
        """The network that is validated, kept as `best` and saved at the end."""
        if self.stage.final == "teacher" and self.teacher is not None:
            return self.teacher.network
        return self.network if self.ema is None else self.ema.network

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint must hold to go on from here."""
        optimizer = optim.optimizer_tensors(self.optimizer, self.network)
        modules = {name: module.state_dict() for name, module in self._modules().items()}
        return modules | {"optimizer": optimizer}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `tensors` gave, after `begin` of the same stage."""
        for name, module in self._modules().items():
            module.load_state_dict(tensors[name])
        optim.load_optimizer_tensors(self.optimizer, self.network, tensors["optimizer"])

    def _modules(self) -> dict[str, nn.Module]:
        always: dict[str, nn.Module] = {"network": self.network, "objective": self.objective}
        averages = {"teacher": self.teacher, "ema": self.ema}
        return always | {name: module for name, module in averages.items() if module is not None}

    def _set_lr(self, progress: Progress) -> None:
        settings = self.settings
        steps, floor = progress.steps, settings.min_lr_ratio
        # At most half of a stage, which would end at its highest rate otherwise.
        warmup = min(round(settings.warmup_epochs * self.steps_per_epoch), steps // 2)
        factor = optim.lr_factor(progress.step, steps=steps, warmup=warmup, floor=floor)
        self.lr = settings.lr * self.stage.lr * factor
        optim.set_lr(self.optimizer, self.lr)

    def _prepare(self, batch: Batch, step: int) -> Batch:
        settings, batch = self.settings, self._transfer(batch)
        if settings.mixup == 0 and settings.cutmix == 0:
            return batch
        mixed = mix(
            batch.images.to(self.runtime.dtype) / 255,
            batch.labels,
            batch.index,
            classes=self.classes,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            seed=settings.seed,
            step=step,
            offset=self.runtime.rank * batch.images.shape[1],
        )
        return Batch(*mixed)

    def _forward(self, batch: Batch, step: int, number: int) -> MicroBatch:
        student = self._student_outputs(batch, step, number)
        return MicroBatch(batch, student, self._teacher_outputs(batch, step, number))

    def _student_outputs(self, batch: Batch, step: int, number: int) -> Outputs:
        offset = self._offset(batch, number)
        # For random numbers that are not keyed to a sample; the first part of rank 0 starts from seed + step.
        torch.manual_seed((self.settings.seed + step + (offset << 40)) % (1 << 63))
        views = self.stage.student_views
        self.network.key.set(self.settings.seed, step, offset, views)
        return self.runtime.forward(self._wrapped, batch.images[:views].flatten(0, 1))

    def _teacher_outputs(self, batch: Batch, step: int, number: int) -> Outputs | None:
        """The teacher's outputs, or None in a stage without one."""
        if self.teacher is None or self.stage.teacher is None:
            return None
        views, own = self.stage.student_views, self.stage.teacher.crop == "own"
        read = (batch.images[views:] if own else batch.images[:views]).flatten(0, 1)
        salted, offset = self.settings.seed ^ TEACHER_SALT, self._offset(batch, number)
        self.teacher.network.key.set(salted, step, offset, 1 if own else views)
        with self.runtime.autocast():
            outputs: Outputs = self.teacher(read)
        return outputs

    def _offset(self, batch: Batch, number: int) -> int:
        """The position of a part's first image in the global batch."""
        return (self.runtime.rank * self.settings.accumulate + number) * batch.images.shape[1]

    def _gather(self, part: MicroBatch) -> MicroBatch:
        """The part over all ranks, in the order of the global batch. Images are not gathered: no loss reads them."""
        gather, batch = self.runtime.gather, part.batch
        whole = Batch(batch.images, gather(batch.labels), gather(batch.index))
        size = batch.labels.shape[0]
        teacher = None if part.teacher is None else self._gather_outputs(part.teacher, size)
        return MicroBatch(whole, self._gather_outputs(part.student, size), teacher)

    def _gather_outputs(self, outputs: Outputs, size: int) -> Outputs:
        views = outputs.features.shape[0] // size
        return Outputs(*(None if o is None else self.runtime.gather(o, views) for o in outputs))  # type: ignore[arg-type]

    def _update_averages(self, whole: MicroBatch, progress: Progress) -> None:
        """After the optimiser: update the bank, the teacher and the averaged copy."""
        with torch.no_grad():
            self.objective.update(*whole)
        policy, step = self.stage.teacher, progress.step + 1
        if self.teacher is not None and policy is not None:
            momentum = momentum_at(policy, step, progress.steps, self.steps_per_epoch)
            self.teacher.update(self.network, momentum)
        if self.ema is not None:
            # In the first steps the plain mean of the weights so far.
            self.ema.update(self.network, min(self.settings.ema, 1 - 1 / (step + 1)))
