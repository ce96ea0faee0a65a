"""The one training loop of every arm.

The data lies on the device as tensors; a step makes no host synchronisation: losses stay in a buffer on the device, which is read
at most about once a second and at fixed steps where divergence is looked for. Evaluation covers the whole split and its time does
not count. Everything random is a function of the run's seed, so a killed run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.estimators import from_config
from forwardgrad.lab import data, environment, models, store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.evaluate import finite, losses_of, published_reading, summary
from forwardgrad.lab.precision import arranged, computing
from forwardgrad.lab.run import Optimizer, Run, stream, to_json
from forwardgrad.memory import peak_bytes
from forwardgrad.nesterov import Nesterov
from forwardgrad.step import cap_step
from forwardgrad.training_step import TrainingStep

CHECK_EVERY = 100  # steps between looks for divergence: a fixed schedule, so that the outcome does not depend on speed
STUCK_STEPS = 500  # a run whose loss stays above the bound for so many steps in a row, or half of a short run, has diverged ...
STUCK_FACTOR = 20.0  # ... the bound being so many times the loss of guessing, ln(classes)
FIRST_EVALUATIONS = (50, 100, 200, 400)  # steps; then every epoch
COUNTED = ("step", "seconds", "passes", "peak", "strides", "evaluations")  # what a run has counted so far, as a checkpoint holds it
WALKED = ("step", "norm_growth", "relative_step")
EVALUATED = ("step", "epoch", "seconds", "validation_loss", "validation_accuracy", "norm_growth", "relative_step")


@dataclass
class _State:
    """Everything that changes while a run goes on; a checkpoint holds all of it but the batch order, which follows from the seed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    take: TrainingStep
    generator: torch.Generator
    losses: Tensor
    derivatives: Tensor  # of every step: root mean square over its tangents, before any clip; NaN where there are none
    start: float  # the parameters' norm before the first step
    resident: int  # bytes on the GPU before the model was there
    step: int = 0
    seconds: float = 0.0
    passes: int = 0
    peak: int = 0
    strides: list[float] = field(default_factory=list)  # relative lengths of the steps measured since the last evaluation
    evaluations: list[list[float]] = field(default_factory=list)
    walk: list[list[float]] = field(default_factory=list)
    order: Tensor | None = None  # of the epoch `drawn`; drawn again after a resume
    drawn: int = -1

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def dump(self) -> bytes:
        content = {
            **{name: part.state_dict() for name, part in self.parts().items()},
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "losses": self.losses[: self.step].clone(),
            "derivatives": self.derivatives[: self.step].clone(),
            "walk": self.walk,
            "memory": {name: (kept.device.type == "cpu", kept) for name, kept in self.take.state.items()},
            **{name: getattr(self, name) for name in COUNTED},
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def load(self, path: Path) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(content[name])
        self.generator.set_state(content["generator"])
        torch.set_rng_state(content["global"])
        for name in COUNTED:
            setattr(self, name, content[name])
        self.losses[: self.step] = content["losses"].to(self.losses.device)
        if "walk" in content:  # checkpoints were without these once
            self.derivatives[: self.step] = content["derivatives"].to(self.losses.device)
            self.walk = content["walk"]
        memory = content["memory"].items()
        self.take.state.update({name: kept if at_home else kept.to(self.losses.device) for name, (at_home, kept) in memory})


def train(run: Run, folder: Path, *, device: str = "cpu", data_dir: Path | None = None, checkpoint_seconds: float = 60.0) -> dict[str, Any]:
    """Train one run in its folder, or go on with it, and return its result; a finished run is only read.

    Raises UserError for data that is missing or damaged, an unknown estimator option, or a device that is not there.
    """
    if (done := store.read_result(folder)) is not None:
        return done
    on = environment.device(device)
    dataset = data.load(run.data, run.seed, on, data_dir)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        state = _begin(run, dataset, on)
        with store.alone(folder):
            if (done := store.read_result(folder)) is not None:  # another process was quicker
                return done
            store.write_json(folder / "run.json", to_json(run))
            _say_where(folder, environment.describe(on))
            _resume(state, folder)
            reason = _loop(run, dataset, state, folder, checkpoint_seconds)
            return _finish(run, dataset, state, folder, reason)


def _say_where(folder: Path, here: dict[str, Any]) -> None:
    """Write environment.json; a run that goes on elsewhere keeps where it was before."""
    before = store.read_json(folder / "environment.json")
    if before is not None and {key: before.get(key) for key in here} != here:
        here = {**here, "before": before}
    store.write_json(folder / "environment.json", here)


def _begin(run: Run, dataset: data.Dataset, on: torch.device) -> _State:
    try:
        estimator = from_config(run.estimator)
    except ValueError as error:
        raise UserError(f"the estimator {run.estimator} cannot be used: {error}") from error
    resident = torch.cuda.memory_allocated(on) if on.type == "cuda" else 0
    torch.manual_seed(stream(run.seed, "initialisation"))
    model = arranged(models.build(run.model, dataset.shape, dataset.classes).to(on), run.precision)
    optimizer = build_optimizer(run.optimizer, model, fused=run.precision != "float32")
    steps = run.epochs * _steps_per_epoch(run, dataset)
    schedule = build_schedule(run.optimizer, optimizer, steps)
    generator = torch.Generator(on).manual_seed(stream(run.seed, "directions"))
    start = _norm(model.parameters())
    losses, derivatives = torch.zeros(steps, device=on), torch.full((steps,), math.nan, device=on)
    take = TrainingStep(_loss(run), model, optimizer, estimator, generator=generator, engine=run.engine)
    return _State(model, optimizer, schedule, take, generator, losses, derivatives, start, resident)


def _loss(run: Run) -> Callable[..., Tensor]:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with computing(run.precision, images.device):
            return F.cross_entropy(model(images), labels)

    return loss


def build_optimizer(options: Optimizer, model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a run; Nesterov is the true look-ahead form for every arm. `fused` takes Adam's one kernel for a step: faster, and
    other bits than the plain form, which float32 runs keep."""
    if options.name == "sgd":
        return torch.optim.SGD(model.parameters(), options.lr, momentum=options.momentum)
    if options.name == "nesterov":
        return Nesterov(model.parameters(), options.lr, options.momentum)
    return torch.optim.Adam(model.parameters(), options.lr, (options.beta1, options.beta2), fused=fused or None)


def build_schedule(options: Optimizer, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over a run of so many steps."""
    if not options.anneal:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(-options.decay))
    course = lambda step: math.exp(-options.decay * step) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, course)


def _resume(state: _State, folder: Path) -> None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    try:
        state.load(path)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise store.damaged(path, type(error).__name__) from error


def _steps_per_epoch(run: Run, dataset: data.Dataset) -> int:
    return math.ceil(len(dataset.train.labels) / run.batch_size)


def _loop(run: Run, dataset: data.Dataset, state: _State, folder: Path, checkpoint_seconds: float) -> str | None:
    """Train to the end or to divergence; returns why a run diverged."""
    per_epoch, total = _steps_per_epoch(run, dataset), len(state.losses)
    at = {step for step in FIRST_EVALUATIONS if step < per_epoch} | set(range(per_epoch, total + 1, per_epoch))
    saved, pace = time.monotonic(), 1
    while state.step < total:
        look = min(step for step in (*at, state.step - state.step % CHECK_EVERY + CHECK_EVERY, total) if step > state.step)
        if look > state.step + 1:  # up to the step before the one that is looked at
            per_second = _timed(run, dataset, state, min(state.step + pace, look - 1))
            pace = max(1, min(CHECK_EVERY, round(per_second)))  # about a second's worth
            if state.step == look - 1:
                continue
        else:
            state.strides.append(_measured(run, dataset, state, watch=look in at))
            state.walk.append([look, _growth(state), state.strides[-1]])
            if (look % CHECK_EVERY == 0 or look == total) and (reason := _diverged(state, dataset.classes)):
                return reason
            if look in at:
                _evaluate(run, dataset, state, per_epoch)
        _say(state, total, folder)
        if time.monotonic() - saved >= checkpoint_seconds:
            store.write_whole(folder / "checkpoint.pt", state.dump())
            saved = time.monotonic()
    return None


def _timed(run: Run, dataset: data.Dataset, state: _State, stop: int) -> float:
    """Advance to `stop`, counting the time and the GPU's memory; returns the steps taken in a second."""
    on, start = state.losses.device, state.step
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    began = time.perf_counter()
    _advance(run, dataset, state, stop)
    elapsed = time.perf_counter() - began
    state.seconds += elapsed
    if on.type == "cuda":
        state.peak = max(state.peak, torch.cuda.max_memory_allocated(on) - state.resident)
    return (stop - start) / elapsed


def _measured(run: Run, dataset: data.Dataset, state: _State, *, watch: bool) -> float:
    """Take one step and return its relative length ‖Δθ‖/‖θ‖; the copy that this takes is in neither the time nor the memory of the run."""
    before, peak = [p.detach().clone() for p in state.model.parameters()], state.peak
    if watch and not state.losses.is_cuda and run.engine == "eager":  # what a compiled step allocates cannot be watched
        _watched(run, dataset, state)
    else:
        _timed(run, dataset, state, state.step + 1)
        state.peak = peak
    size = _norm(before)
    return _norm(p.detach() - b for p, b in zip(state.model.parameters(), before, strict=True)) / size if size else math.inf


def _watched(run: Run, dataset: data.Dataset, state: _State) -> None:
    """Take one step on the processor and see what memory it takes: that slows it, so it counts as long as the steps before it on average.

    The peak is what training holds all the time (parameters, the optimizer's state, the estimator's memory) and the most that tensors made
    during the step hold at once. A GPU's is what its allocator gave out: scratch of single kernels and rounding come on top there.
    """
    _draw_order(run, dataset, state)  # a resumed run has to, an undisturbed one had to before: it is no part of the step
    slots = (slot for slots in state.optimizer.state.values() for slot in slots.values())
    tensors = (*state.model.state_dict().values(), *slots, *state.take.state.values())
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    began = time.perf_counter()
    above = peak_bytes(lambda: _advance(run, dataset, state, state.step + 1), [state.losses.device])
    state.seconds += state.seconds / (state.step - 1) if state.step > 1 else time.perf_counter() - began
    state.peak = max(state.peak, sum(stored.values()) + above)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2 for t in tensors))


def _evaluate(run: Run, dataset: data.Dataset, state: _State, per_epoch: int) -> None:
    """Add a row to the evaluations; the relative step is the root mean square of those measured since the last row."""
    loss, accuracy = summary(losses_of(state.model, dataset, dataset.validation, run.precision))
    stride = math.sqrt(sum(stride**2 for stride in state.strides) / len(state.strides))
    state.evaluations.append([state.step, state.step / per_epoch, state.seconds, loss, accuracy, _growth(state), stride])
    state.strides = []


def _growth(state: _State) -> float:
    return _norm(state.model.parameters()) / state.start if state.start else math.inf


def _advance(run: Run, dataset: data.Dataset, state: _State, stop: int) -> None:
    """Take the steps up to `stop`, all of one epoch, without waiting for the device in between."""
    order = _draw_order(run, dataset, state)
    for step in range(state.step, stop):
        start = step % _steps_per_epoch(run, dataset) * run.batch_size
        batch = order[start : start + run.batch_size]
        images, labels = arranged(dataset.pixels(dataset.train.images[batch]), run.precision), dataset.train.labels[batch]
        state.losses[step] = _step(run, state, step, images, labels)
        state.schedule.step()
    state.step = stop
    if state.losses.is_cuda:
        torch.cuda.synchronize(state.losses.device)


def _draw_order(run: Run, dataset: data.Dataset, state: _State) -> Tensor:
    """The order of the training examples in the epoch under way."""
    epoch = state.step // _steps_per_epoch(run, dataset)
    if state.order is None or state.drawn != epoch:
        shuffle = torch.Generator().manual_seed(stream(run.seed, f"order of epoch {epoch}"))
        state.order = torch.randperm(len(dataset.train.labels), generator=shuffle).to(state.losses.device)
        state.drawn = epoch
    return state.order


def _step(run: Run, state: _State, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """One optimizer step on a batch: the parameters shrink, the gradient is estimated where they are then, the step is held to its cap."""
    options = run.optimizer
    if options.weight_decay:
        with torch.no_grad():
            for group in state.optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * options.weight_decay)
    with cap_step(state.model.parameters(), options.cap) if options.cap else nullcontext():
        record = state.take(images, labels)
    state.passes += record.forward_passes
    if len(record.derivatives):
        state.derivatives[step] = record.derivatives.square().mean().sqrt()
    return record.loss


def _diverged(state: _State, classes: int) -> str | None:
    """Why the run is beyond help, None if it is not; cuts the run back to the step where that became certain."""
    losses = state.losses[: state.step].cpu()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        state.step = int(bad[0]) + 1
        return "the loss is not finite"
    bound, window = STUCK_FACTOR * math.log(classes), min(STUCK_STEPS, max(1, len(state.losses) // 2))
    if state.step >= window and bool((losses[-window:] > bound).all()):
        return f"the loss stayed above {bound:.1f} for {window} steps"
    return None


def _say(state: _State, total: int, folder: Path) -> None:
    loss = float(state.losses[max(0, state.step - CHECK_EVERY) : state.step].mean())
    validation = state.evaluations[-1][3] if state.evaluations else math.nan
    status = {"step": state.step, "steps": total, "loss": loss, "validation_loss": validation, "seconds": state.seconds}
    store.write_json(folder / "status.json", {key: finite(value) for key, value in status.items()})


def _finish(run: Run, dataset: data.Dataset, state: _State, folder: Path, reason: str | None) -> dict[str, Any]:
    """Evaluate, write the tables and last of all the result, then drop what only an unfinished run needs."""
    validation = summary(losses_of(state.model, dataset, dataset.validation, run.precision))
    test = None
    if run.test:
        measured = losses_of(state.model, dataset, dataset.test, run.precision)
        loss, accuracy = summary(measured)
        test = {"loss": finite(loss), "accuracy": accuracy, "examples": len(measured[0]), **published_reading(measured[0], run.seed)}
    rows = ([*map(int, row[:1]), *(finite(v) for v in row[1:])] for row in state.evaluations if row[0] <= state.step)
    store.write_table(folder / "evaluations.csv", EVALUATED, rows)
    walk = ([int(step), *map(finite, rest)] for step, *rest in state.walk if step <= state.step)
    store.write_table(folder / "walk.csv", WALKED, walk)
    columns = {"loss": state.losses[: state.step].tolist(), "derivative": state.derivatives[: state.step].tolist()}
    if all(map(math.isnan, columns["derivative"])):
        del columns["derivative"]
    losses = ([i + 1, *(f"{value:.7g}" for value in values)] for i, values in enumerate(zip(*columns.values(), strict=True)))
    store.write_table(folder / "losses.csv.gz", ["step", *columns], losses)
    result = {
        "status": "diverged" if reason else "finished",
        "reason": reason,
        "diverged_at": state.step if reason else None,
        "steps": state.step,
        "epochs": state.step / _steps_per_epoch(run, dataset),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "seconds": state.seconds,
        "forward_passes": state.passes,
        "peak_bytes": state.peak or None,
        "initial_norm": finite(state.start),
        "validation_loss": finite(validation[0]),
        "validation_accuracy": validation[1],
        "test": test,
    }
    store.write_json(folder / "result.json", result)
    for name in ("checkpoint.pt", "status.json"):
        (folder / name).unlink(missing_ok=True)
    return result
