"""The one training loop of every arm.

The data lies on the device as tensors; a step makes no host synchronisation: losses stay in a buffer on the device, which is read
at most about once a second and at fixed steps where divergence is looked for. Evaluation covers the whole split and its time does
not count. Everything random is a function of the run's seed, so a killed run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.lab import data, environment, interrupts, store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run, import_path, to_json
from forwardgrad.lab.training import parts as own
from forwardgrad.lab.training.norms import walked
from forwardgrad.lab.training.outcome import diverged, evaluate, finish, say, say_where
from forwardgrad.lab.training.precision import arranged, computing
from forwardgrad.lab.training.state import State, begin, draw_order, resume, steps_per_epoch
from forwardgrad.lab.training.tensorboard import Board
from forwardgrad.optim import cap_step
from forwardgrad.training_step import TrainingStep

CHECK_EVERY = 100  # steps between looks for divergence: a fixed schedule, so that the outcome does not depend on speed
EARLY, LATE = 1000, 500  # steps up to which the walk is noted at every look, and between two rows of it after that
FIRST_EVALUATIONS = (50, 100, 200, 400)  # steps; then every epoch ...
MOST_EVALUATIONS = 100  # ... or every so many, where a small data set has more epochs than that


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    data_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    tensorboard: Path | None = None,
) -> dict[str, Any]:
    """Train one run in its folder, or go on with it, and return its result; a finished run is only read.

    TensorBoard's files, if asked for, go to a folder of the run's own in `tensorboard`.
    Raises UserError for data that is missing or damaged, an unknown estimator option, or a device that is not there.
    """
    if (done := store.read_result(folder)) is not None:
        return done
    on = environment.device(device)
    _check_code(run)
    dataset = own.dataset(run, on, data_dir)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        state = begin(run, dataset, on)
        with store.alone(folder):
            if (done := store.read_result(folder)) is not None:  # another process was quicker
                return done
            store.write_json(folder / "run.json", to_json(run))
            say_where(folder, environment.describe(on))
            resume(state, folder)
            with Board(tensorboard and tensorboard / run.identity, run, state) as board:
                reason = _loop(run, dataset, state, folder, checkpoint_seconds, board)
                result = finish(run, dataset, state, folder, reason)
                board.end(result)
            return result


def _loop(run: Run, dataset: data.Dataset, state: State, folder: Path, checkpoint_seconds: float, board: Board) -> str | None:
    """Train to the end or to divergence; returns why a run diverged."""
    per_epoch, total = steps_per_epoch(run, dataset), len(state.losses)
    at = evaluated_at(per_epoch, total)
    saved, pace = time.monotonic(), 1
    while state.step < total:
        interrupts.check()
        look = next_look(state.step, at, total)
        if look > state.step + 1:  # up to the step before the one that is looked at
            per_second = _timed(run, dataset, state, min(state.step + pace, look - 1))
            pace = max(1, min(CHECK_EVERY, round(per_second)))  # about a second's worth
            if state.step == look - 1:
                continue
        else:
            if look in at or walked_at(look):
                _measured(run, dataset, state, watch=look in at)
            else:
                _timed(run, dataset, state, look)
            if (look % CHECK_EVERY == 0 or look == total) and (reason := diverged(run, state, dataset.classes)):
                return reason
            if look in at:
                evaluate(run, dataset, state, per_epoch)
        say(state, total, folder)
        board.note()
        if time.monotonic() - saved >= checkpoint_seconds:
            board.flush()
            store.write_checkpoint(folder / "checkpoint.pt", state.dump())
            saved = time.monotonic()
    return None


def _check_code(run: Run) -> None:
    """Refuse to go on with code that is not what the description stands for: the result would be filed under another's name."""
    named = import_path.paths(run)
    if named and (found := import_path.digest(named)) != run.code:
        raise UserError(f"the code of {', '.join(named.values())} changed while the study ran ({run.code}, now {found}): start it again")


def evaluated_at(per_epoch: int, total: int) -> set[int]:
    """The steps after which a run is evaluated: a few early ones, then every epoch, or every so many where there are more than 100."""
    every = per_epoch * math.ceil(total / per_epoch / MOST_EVALUATIONS)
    return {step for step in FIRST_EVALUATIONS if step < min(per_epoch, total)} | set(range(every, total + 1, every)) | {total}


def walked_at(step: int) -> bool:
    """Whether the walk of the parameters has a row after a step that is looked at: every 100 steps at first, every 500 later."""
    return step <= EARLY or step % LATE == 0


def next_look(step: int, at: set[int], total: int) -> int:
    """The next step that is looked at."""
    return min(look for look in (*at, step - step % CHECK_EVERY + CHECK_EVERY, total) if look > step)


def _timed(run: Run, dataset: data.Dataset, state: State, stop: int) -> float:
    """Advance to `stop`, counting the time and the GPU's memory; returns the steps taken in a second."""
    on, start = state.losses.device, state.step
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    began = time.perf_counter()
    advance(run, dataset, state, stop)
    elapsed = time.perf_counter() - began
    state.seconds += elapsed
    if on.type == "cuda":
        state.peak = max(state.peak, torch.cuda.max_memory_allocated(on) - state.resident)
    return (stop - start) / elapsed


def _measured(run: Run, dataset: data.Dataset, state: State, *, watch: bool) -> float:
    """Take one step, and note and return its relative length ‖Δθ‖/‖θ‖; the copy that takes is in neither the run's time nor its memory."""
    before, peak = state.copied(), state.peak
    if watch and not state.losses.is_cuda and run.engine == "eager":  # what a compiled step allocates cannot be watched
        _watched(run, dataset, state)
    else:
        _timed(run, dataset, state, state.step + 1)
        state.peak = peak
    size, now, way = walked(before, list(state.model.parameters()))
    state.strides.append(way / size if size else math.inf)
    state.walk.append([state.step, now / state.start if state.start else math.inf, state.strides[-1]])
    return state.strides[-1]


def _watched(run: Run, dataset: data.Dataset, state: State) -> None:
    """Take one step on the processor and see what memory it takes: that slows it, so it counts as long as the steps before it on average.

    The peak is what training holds all the time (parameters, the optimizer's state, the estimator's memory) and the most that tensors made
    during the step hold at once. A GPU's is what its allocator gave out: scratch of single kernels and rounding come on top there.
    """
    draw_order(run, dataset, state)  # a resumed run has to, an undisturbed one had to before: it is no part of the step
    slots = (slot for slots in state.optimizer.state.values() for slot in slots.values())
    tensors = (*state.model.state_dict().values(), *slots, *state.memory.values())
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    began = time.perf_counter()
    above = peak_bytes(lambda: advance(run, dataset, state, state.step + 1), [state.losses.device])
    state.seconds += state.seconds / (state.step - 1) if state.step > 1 else time.perf_counter() - began
    state.peak = max(state.peak, sum(stored.values()) + above)


def advance(run: Run, dataset: data.Dataset, state: State, stop: int) -> None:
    """Take the steps up to `stop` without waiting for the device in between."""
    while state.step < stop:
        _within_epoch(run, dataset, state, min(stop, next_epoch(state.step, steps_per_epoch(run, dataset))))
    if state.losses.is_cuda:
        torch.cuda.synchronize(state.losses.device)


def next_epoch(step: int, per_epoch: int) -> int:
    """The step that ends the epoch under way."""
    return step - step % per_epoch + per_epoch


def _within_epoch(run: Run, dataset: data.Dataset, state: State, stop: int) -> None:
    order = draw_order(run, dataset, state)
    for step in range(state.step, stop):
        start = step % steps_per_epoch(run, dataset) * run.batch_size
        batch = order[start : start + run.batch_size]
        images, labels = arranged(dataset.pixels(dataset.train.images[batch]), run.precision), dataset.train.labels[batch]
        state.losses[step] = _step(run, state, step, images, labels)
        state.schedule.step()
    state.step = stop


def loss_of(run: Run) -> Callable[..., Tensor]:
    """The loss of a run, as a training step takes it."""

    measure = own.loss(run)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with computing(run.precision, images.device):
            return measure(model(images), labels)

    return loss


def _step(run: Run, state: State, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """One optimizer step on a batch: the parameters shrink, the gradient is estimated where they are then, the step is held to its cap."""
    options = run.optimizer
    if state.whole is None:
        pieces = loss_of(run), state.model, state.optimizer, state.estimator
        state.whole = TrainingStep(*pieces, generator=state.generator, state=state.memory, engine=run.engine)
    if options.weight_decay:
        with torch.no_grad():
            for group in state.optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * options.weight_decay)
    with cap_step(state.model.parameters(), options.cap) if options.cap else nullcontext():
        record = state.whole(images, labels)
    state.passes += record.forward_passes
    if len(record.derivatives):
        state.derivatives[step] = record.derivatives.abs() if len(record.derivatives) == 1 else record.derivatives.square().mean().sqrt()
    return record.loss
