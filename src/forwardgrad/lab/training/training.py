"""One run under way: its description, its data and its state, and the steps that it takes.

The data lies on the device as tensors. A step waits for nothing from the device: losses stay in a buffer there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.journal import StepLog
from forwardgrad.lab import lockstep
from forwardgrad.lab.data import Dataset, crop_flip, draws_of_epoch
from forwardgrad.lab.energy import EnergyMeter, add_joules
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run, stream
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.norms import norm, trained, walked
from forwardgrad.lab.training.precision import arranged
from forwardgrad.lab.training.schedule import Schedule
from forwardgrad.lab.training.state import State, buffers
from forwardgrad.lab.training.step_logs import held, opened
from forwardgrad.ranks import Distributed
from forwardgrad.training_step import TrainingStep


@dataclass
class Training:
    """A run, the data it trains on, and how far it has come.

    In a `group` of ranks this is one of them: it takes its part of every batch.
    """

    run: Run
    dataset: Dataset
    state: State
    meter: EnergyMeter = field(
        default_factory=EnergyMeter
    )  # of the joules beside the seconds, where the run is alone and the machine tells
    group: Distributed | None = None
    log: StepLog | None = None
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        examples, shards = len(self.dataset.train), self.group.shards if self.group else 1
        self.schedule = Schedule.of(self.run, examples)
        self._uneven = any(size % shards for size in lockstep.sizes(self.run, examples))

    @classmethod
    def begin(
        cls, run: Run, dataset: Dataset, on: torch.device, group: Distributed | None = None, *, data_dir: Path | None = None
    ) -> Training:
        """A run before its first step. From here on the global generator is that of the run."""
        resident = torch.cuda.memory_allocated(on) if on.type == "cuda" else 0
        estimator, model = builders.estimator(run), builders.initialised_model(run, dataset, on, data_dir)
        optimizer = builders.optimizer(run.optimizer, model, fused=run.precision != "float32")
        steps = Schedule.of(run, len(dataset.train)).total
        lr_schedule = builders.lr_schedule(run.optimizer, optimizer, steps)
        losses, derivatives = buffers(steps, on)
        start, generator = norm(trained(model)), builders.generator(run, on)
        state = State(model, optimizer, lr_schedule, estimator, generator, losses, derivatives, start, resident)
        return cls(run, dataset, state, group=group)

    def advance(self, stop: int) -> None:
        """Take the steps up to `stop` without waiting for the device in between."""
        while self.state.step < stop:
            self._advance_within_epoch(min(stop, self.schedule.end_of_epoch(self.state.step)))
        if self.state.losses.is_cuda:
            torch.cuda.synchronize(self.state.losses.device)

    def advance_timed(self, stop: int) -> float:
        """Advance to `stop`, counting the time, the joules and the GPU's memory; returns the steps taken in a second.

        Making graphs of steps is no training, and its time is counted apart. Its joules are not, as they cannot be told.
        """
        state, prepared = self.state, self._prepared()
        on, start = state.losses.device, state.step
        if on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(on)
        before = self.meter.read()
        began = time.perf_counter()
        self.advance(stop)
        preparing = self._prepared() - prepared
        elapsed = time.perf_counter() - began - preparing
        state.preparing += preparing
        state.seconds += elapsed
        state.joules = add_joules(state.joules, self.meter.since(before))
        if on.type == "cuda":
            state.peak = max(state.peak, torch.cuda.max_memory_allocated(on) - state.resident)
        return (stop - start) / elapsed

    def step_measured(self, *, with_memory: bool) -> float:
        """Take one step, and note and return its relative length ‖Δθ‖/‖θ‖.

        The copy of the parameters that this takes counts neither in the run's time nor in its memory.
        """
        state = self.state
        before, peak = state.copy_parameters(), state.peak
        if with_memory and not state.losses.is_cuda and self.run.engine == "eager":  # what a compiled step allocates cannot be watched
            self.step_with_memory()
        else:
            self.advance_timed(state.step + 1)
            state.peak = peak
        size, now, way = walked(before, trained(state.model))
        state.strides.append(way / size if size else float("inf"))
        state.walk.append([state.step, now / state.start if state.start else float("inf"), state.strides[-1]])
        return state.strides[-1]

    def step_with_memory(self) -> None:
        """Take one step on the processor and see what memory it takes.

        Watching slows the step down, so it counts as long as the steps before it on average. The peak is what training holds all the time
        (parameters, the optimizer's state, the estimator's memory) and the most that tensors made during the step hold at once. A GPU's is
        what its allocator gave out: scratch of single kernels and rounding come on top there.
        """
        state = self.state
        self.order()  # a resumed run has to draw it, an undisturbed one had to before: it is no part of the step
        slots = (slot for slots in state.optimizer.state.values() for slot in slots.values())
        tensors = (*state.model.state_dict().values(), *slots, *state.memory.values())
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
        before = self.meter.read()
        began = time.perf_counter()
        above = peak_bytes(lambda: self.advance(state.step + 1), [state.losses.device])
        if state.step > 1:
            state.seconds *= 1 + 1 / (state.step - 1)
            state.joules = state.joules and {name: value * (1 + 1 / (state.step - 1)) for name, value in state.joules.items()}
        else:
            state.seconds += time.perf_counter() - began
            state.joules = add_joules(state.joules, self.meter.since(before))
        state.peak = max(state.peak, sum(stored.values()) + above)

    def _prepared(self) -> float:
        """Seconds that this process has spent on graphs of steps."""
        return 0.0 if self.state.training_step is None else self.state.training_step.preparing

    def order(self) -> Tensor:
        """The order of the training examples in the epoch under way."""
        state, epoch = self.state, self.schedule.epoch(self.state.step)
        if state.order is None or state.order_epoch != epoch:
            state.order = order_of_epoch(self.run.seed, epoch, len(self.dataset.train)).to(state.losses.device)
            if self.run.augment:
                state.draws = draws_of_epoch(self.run.seed, epoch, len(state.order)).to(state.losses.device)
            state.order_epoch = epoch
        return state.order

    def _made_step(self, log: StepLog | None) -> TrainingStep:
        state = self.state
        what = builders.batch_loss(self.run), state.model, state.optimizer, state.estimator
        how: dict[str, Any] = {"generator": state.generator, "state": state.memory, "engine": self.run.engine, "log": log}
        return TrainingStep(*what, **how, group=self.group)

    def log_to(self, folder: Path) -> None:
        """Write the numbers of the steps from here on to the log of a folder. UserError where that is the log of another run."""
        self.log = opened(folder, self.state.step)
        try:
            self.state.training_step = self._made_step(self.log)
        except ValueError as error:
            raise UserError(str(error)) from error

    def sync_log(self) -> None:
        """Wait until the log is on the disk, so that no checkpoint is ahead of it."""
        if self.log is not None:
            self.log.sync()

    def compare(self) -> None:
        """See to it that all ranks of a group end with the same parameters."""
        if self.group is not None and self.group.many:
            self.group.compare(self.state.model)

    def end_log(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _advance_within_epoch(self, stop: int) -> None:
        run, dataset, state, order = self.run, self.dataset, self.state, self.order()
        for step in range(state.step, stop):
            mine, weight = self._part(step)
            batch = order[mine]
            inputs, labels = dataset.train.inputs[batch], dataset.train.labels[batch]
            if state.draws is not None:
                inputs = crop_flip(inputs, state.draws[mine])
            inputs = arranged(dataset.for_model(inputs), run.precision)
            state.losses[step] = self._step(step, inputs, labels, *weight)
            state.lr_schedule.step()
        state.step = stop

    def _part(self, step: int) -> tuple[slice, tuple[Tensor, ...]]:
        """What of an epoch's order a step takes here. Of ranks whose parts are not of one size: also the weight of this one's loss."""
        start = step % self.schedule.per_epoch * self.run.batch_size
        stop = min(start + self.run.batch_size, len(self.dataset.train))
        if self.group is None:
            return slice(start, stop), ()
        lockstep.draw_apart(self.run, step, self.group)
        mine, home = lockstep.part(stop - start, self.group), self.state.losses.device
        weight = torch.tensor(lockstep.weight(stop - start, self.group), dtype=torch.float64, device=home) if self._uneven else None
        return slice(start + mine.start, start + mine.stop), () if weight is None else (weight,)

    def _step(self, step: int, inputs: Tensor, labels: Tensor, *weight: Tensor) -> Tensor:
        """One optimizer step on a batch.

        The parameters shrink, the gradient is estimated where they are then, and the step is held to its cap.
        """
        state = self.state
        if state.training_step is None:
            state.training_step = self._made_step(None)
        with held(state.optimizer, state.model, self.run.optimizer):
            record = state.training_step(inputs, labels, *weight)
        state.passes += record.forward_passes
        if len(record.derivatives):
            found = record.derivatives
            state.derivatives[step] = found.abs() if len(found) == 1 else found.square().mean().sqrt()
        return record.loss


def order_of_epoch(seed: int, epoch: int, examples: int) -> Tensor:
    """The order in which an epoch takes its examples."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(stream(seed, f"order of epoch {epoch}")))
