"""The one training loop of every arm.

The data lies on the device as tensors; a step makes no host synchronisation: losses stay in a buffer on the device, which is read
at most about once a second and at fixed steps where divergence is looked for. Evaluation covers the whole split and its time does
not count. Everything random is a function of the run's seed, so a killed run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.estimators import from_config
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import data, environment, models, store
from forwardgrad.lab.run import Optimizer, Run, stream, to_json
from forwardgrad.nesterov import Nesterov

CHECK_EVERY = 100  # steps between looks for divergence: a fixed schedule, so that the outcome does not depend on speed
STUCK_STEPS = 500  # a run whose loss stays above the bound for so many steps in a row, or half of a short run, has diverged ...
STUCK_FACTOR = 20.0  # ... the bound being so many times the loss of guessing, ln(classes)
FIRST_EVALUATIONS = (50, 100, 200, 400)  # steps; then every epoch
PUBLISHED_READING = 16  # images in the one mini-batch whose loss the paper's Table I shows as 'test loss'


@dataclass
class _State:
    """Everything that changes while a run goes on; a checkpoint holds all of it but the batch order, which follows from the seed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    losses: Tensor
    step: int = 0
    seconds: float = 0.0
    evaluations: list[list[float]] = field(default_factory=list)
    order: Tensor | None = None  # of the epoch under way; drawn again after a resume

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def dump(self) -> bytes:
        content = {
            **{name: part.state_dict() for name, part in self.parts().items()},
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "losses": self.losses[: self.step].clone(),
            "step": self.step,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
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
        self.step, self.seconds, self.evaluations = content["step"], content["seconds"], content["evaluations"]
        self.losses[: self.step] = content["losses"].to(self.losses.device)


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
    torch.manual_seed(stream(run.seed, "initialisation"))
    model = models.build(run.model, dataset.shape, dataset.classes).to(on)
    optimizer = build_optimizer(run.optimizer, model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(-run.optimizer.decay))
    generator = torch.Generator(on).manual_seed(stream(run.seed, "directions"))
    return _State(model, optimizer, schedule, generator, torch.zeros(run.epochs * _steps_per_epoch(run, dataset), device=on))


def build_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run; Nesterov is the true look-ahead form for every arm."""
    if options.name == "sgd":
        return torch.optim.SGD(model.parameters(), options.lr, momentum=options.momentum)
    if options.name == "nesterov":
        return Nesterov(model.parameters(), options.lr, options.momentum)
    return torch.optim.Adam(model.parameters(), options.lr, (options.beta1, options.beta2))


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
        ahead = [state.step + pace, state.step - state.step % CHECK_EVERY + CHECK_EVERY, total]
        stop = min(ahead + [step for step in at if step > state.step])
        began, start = time.perf_counter(), state.step
        _advance(run, dataset, state, stop)
        elapsed = time.perf_counter() - began
        pace = max(1, min(CHECK_EVERY, round((stop - start) / elapsed)))  # about a second's worth
        state.seconds += elapsed
        if (stop % CHECK_EVERY == 0 or stop == total) and (reason := _diverged(state, dataset.classes)):
            return reason
        if stop in at:
            loss, accuracy = summary(losses_of(state.model, dataset, dataset.validation))
            state.evaluations.append([stop, stop / per_epoch, state.seconds, loss, accuracy])
        _say(state, total, folder)
        if time.monotonic() - saved >= checkpoint_seconds:
            store.write_whole(folder / "checkpoint.pt", state.dump())
            saved = time.monotonic()
    return None


def _advance(run: Run, dataset: data.Dataset, state: _State, stop: int) -> None:
    """Take the steps up to `stop`, all of one epoch, without waiting for the device in between."""
    per_epoch = _steps_per_epoch(run, dataset)
    epoch = state.step // per_epoch
    estimator = from_config(run.estimator)
    if state.step % per_epoch == 0 or state.order is None:
        shuffle = torch.Generator().manual_seed(stream(run.seed, f"order of epoch {epoch}"))
        state.order = torch.randperm(len(dataset.train.labels), generator=shuffle).to(state.losses.device)
    for step in range(state.step, stop):
        start = (step - epoch * per_epoch) * run.batch_size
        batch = state.order[start : start + run.batch_size]
        images, labels = dataset.pixels(dataset.train.images[batch]), dataset.train.labels[batch]

        def loss_and_gradient(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            state.optimizer.zero_grad()
            loss = lambda model: F.cross_entropy(model(images), labels)  # noqa: E731
            return estimate_grad_(loss, state.model, estimator, generator=state.generator).loss

        state.losses[step] = state.optimizer.step(loss_and_gradient)  # type: ignore[arg-type]
        state.schedule.step()
    state.step = stop
    if state.losses.is_cuda:
        torch.cuda.synchronize(state.losses.device)


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
    store.write_json(folder / "status.json", {key: _finite(value) for key, value in status.items()})


@torch.no_grad()
def losses_of(model: nn.Module, dataset: data.Dataset, split: data.Split, batch: int = 1000) -> tuple[Tensor, Tensor]:
    """The loss of every example of a split (float64) and whether it was classified rightly."""
    training = model.training
    model.eval()
    losses, right = [], []
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        logits = model(dataset.pixels(images))
        losses.append(F.cross_entropy(logits, labels, reduction="none").double())
        right.append(logits.argmax(1) == labels)
    model.train(training)
    return torch.cat(losses), torch.cat(right)


def summary(measured: tuple[Tensor, Tensor]) -> tuple[float, float]:
    losses, right = measured
    return float(losses.mean()), float(right.double().mean())


def _published_reading(losses: Tensor, seed: int) -> dict[str, float | None]:
    """The loss of one mini-batch of 16 shuffled test images, and the range of such readings of this same network.

    The range runs from the 5th to the 95th percentile of 1,000 such mini-batches.
    """
    generator = torch.Generator().manual_seed(stream(seed, "published reading"))
    losses = losses.cpu()
    draws = torch.stack([torch.randperm(len(losses), generator=generator)[-PUBLISHED_READING:] for _ in range(1000)])
    readings = losses[draws].mean(1)
    low, high = torch.quantile(readings, torch.tensor([0.05, 0.95], dtype=readings.dtype)).tolist()
    return {"last16": _finite(float(readings[0])), "last16_low": _finite(low), "last16_high": _finite(high)}


def _finish(run: Run, dataset: data.Dataset, state: _State, folder: Path, reason: str | None) -> dict[str, Any]:
    """Evaluate, write the tables and last of all the result, then drop what only an unfinished run needs."""
    validation = summary(losses_of(state.model, dataset, dataset.validation))
    test = None
    if run.test:
        measured = losses_of(state.model, dataset, dataset.test)
        loss, accuracy = summary(measured)
        test = {"loss": _finite(loss), "accuracy": accuracy, "examples": len(measured[0]), **_published_reading(measured[0], run.seed)}
    rows = ([*map(int, row[:1]), *(_finite(v) for v in row[1:])] for row in state.evaluations if row[0] <= state.step)
    store.write_table(folder / "evaluations.csv", ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"], rows)
    losses = state.losses[: state.step].tolist()
    store.write_table(folder / "losses.csv.gz", ["step", "loss"], ((i + 1, f"{value:.7g}") for i, value in enumerate(losses)))
    result = {
        "status": "diverged" if reason else "finished",
        "reason": reason,
        "diverged_at": state.step if reason else None,
        "steps": state.step,
        "epochs": state.step / _steps_per_epoch(run, dataset),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "seconds": state.seconds,
        "validation_loss": _finite(validation[0]),
        "validation_accuracy": validation[1],
        "test": test,
    }
    store.write_json(folder / "result.json", result)
    for name in ("checkpoint.pt", "status.json"):
        (folder / name).unlink(missing_ok=True)
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
