"""One run under way: its description, its data and its state, and the steps that it takes.

The data lies on the device as tensors. A step waits for nothing from the device: losses stay in a buffer there.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.lab.data import Dataset
from forwardgrad.lab.studies import Run, stream
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.norms import norm, walked
from forwardgrad.lab.training.precision import arranged
from forwardgrad.lab.training.schedule import Schedule
from forwardgrad.lab.training.state import State, buffers
from forwardgrad.optim import cap_step
from forwardgrad.training_step import TrainingStep


@dataclass
class Training:
    """A run, the data it trains on, and how far it has come."""

    run: Run
    dataset: Dataset
    state: State
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = Schedule.of(self.run, len(self.dataset.train))

    @classmethod
    def begin(cls, run: Run, dataset: Dataset, on: torch.device) -> Training:
        """A run before its first step. From here on the global generator is that of the run."""
        resident = torch.cuda.memory_allocated(on) if on.type == "cuda" else 0
        estimator, model = builders.estimator(run), builders.initialised_model(run, dataset, on)
        optimizer = builders.optimizer(run.optimizer, model, fused=run.precision != "float32")
        steps = Schedule.of(run, len(dataset.train)).total
        lr_schedule = builders.lr_schedule(run.optimizer, optimizer, steps)
        losses, derivatives = buffers(steps, on)
        start, generator = norm(model.parameters()), builders.generator(run, on)
        return cls(run, dataset, State(model, optimizer, lr_schedule, estimator, generator, losses, derivatives, start, resident))

    def advance(self, stop: int) -> None:
        """Take the steps up to `stop` without waiting for the device in between."""
        while self.state.step < stop:
            self._advance_within_epoch(min(stop, self.schedule.end_of_epoch(self.state.step)))
        if self.state.losses.is_cuda:
            torch.cuda.synchronize(self.state.losses.device)

    def advance_timed(self, stop: int) -> float:
        """Advance to `stop`, counting the time and the GPU's memory; returns the steps taken in a second."""
        state = self.state
        on, start = state.losses.device, state.step
        if on.type == "cuda":
            torch.cuda.reset_peak_memory_stats(on)
        began = time.perf_counter()
        self.advance(stop)
        elapsed = time.perf_counter() - began
        state.seconds += elapsed
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
        size, now, way = walked(before, list(state.model.parameters()))
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
        began = time.perf_counter()
        above = peak_bytes(lambda: self.advance(state.step + 1), [state.losses.device])
        state.seconds += state.seconds / (state.step - 1) if state.step > 1 else time.perf_counter() - began
        state.peak = max(state.peak, sum(stored.values()) + above)

    def order(self) -> Tensor:
        """The order of the training examples in the epoch under way."""
        state, epoch = self.state, self.schedule.epoch(self.state.step)
        if state.order is None or state.order_epoch != epoch:
            state.order = order_of_epoch(self.run.seed, epoch, len(self.dataset.train)).to(state.losses.device)
            state.order_epoch = epoch
        return state.order

    def _advance_within_epoch(self, stop: int) -> None:
        run, dataset, state, order = self.run, self.dataset, self.state, self.order()
        for step in range(state.step, stop):
            start = step % self.schedule.per_epoch * run.batch_size
            batch = order[start : start + run.batch_size]
            images, labels = arranged(dataset.pixels(dataset.train.images[batch]), run.precision), dataset.train.labels[batch]
            state.losses[step] = self._step(step, images, labels)
            state.lr_schedule.step()
        state.step = stop

    def _step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on a batch.

        The parameters shrink, the gradient is estimated where they are then, and the step is held to its cap.
        """
        state, options = self.state, self.run.optimizer
        if state.training_step is None:
            what = builders.batch_loss(self.run), state.model, state.optimizer, state.estimator
            state.training_step = TrainingStep(*what, generator=state.generator, state=state.memory, engine=self.run.engine)
        if options.weight_decay:
            for group in state.optimizer.param_groups:
                shrink(group, options.weight_decay)
        with cap_step(state.model.parameters(), options.cap) if options.cap else nullcontext():
            record = state.training_step(images, labels)
        state.passes += record.forward_passes
        if len(record.derivatives):
            found = record.derivatives
            state.derivatives[step] = found.abs() if len(found) == 1 else found.square().mean().sqrt()
        return record.loss


@torch.no_grad()
def shrink(group: dict[str, Any], weight_decay: float) -> None:
    """Shrink the parameters of one group of an optimizer by its learning rate times the weight decay."""
    for p in group["params"]:
        p.mul_(1 - group["lr"] * weight_decay)


def order_of_epoch(seed: int, epoch: int, examples: int) -> Tensor:
    """The order in which an epoch takes its examples."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(stream(seed, f"order of epoch {epoch}")))
