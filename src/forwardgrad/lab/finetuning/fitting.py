"""The loop of fine-tuning: steps, evaluations at fixed steps, a log, checkpoints. Divergence ends it, and is a result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from forwardgrad.lab import interrupts
from forwardgrad.lab.finetuning.kept import Fitting
from forwardgrad.lab.finetuning.outcomes import Judge, TextTask, evaluate
from forwardgrad.lab.finetuning.run_folder import RunFolder
from forwardgrad.lab.finetuning.tokens import Examples
from forwardgrad.lab.training import Schedule, diverged, order_of_epoch


def train_to_end(
    fitting: Fitting,
    task: TextTask,
    train: Examples,
    validation: Examples | None,
    schedule: Schedule,
    folder: RunFolder,
    judge: Judge | None,
    say: Callable[[str], None],
    checkpoint_seconds: float,
) -> str | None:
    """Take all steps, or those until the run has diverged; returns why it did."""
    saved = time.monotonic()
    classes = 0 if judge else len(task.source.classes)

    def look() -> None:
        found = evaluate(fitting.model, task, validation, judge) if validation else {}
        fitting.evaluations.append(_row(fitting, schedule, found))
        folder.write_log(fitting.evaluations)
        say(_line(fitting.evaluations[-1], schedule.total))

    if not fitting.evaluations:
        look()
    while fitting.step < schedule.total:
        interrupts.check()
        _step(fitting, task, train, schedule)
        step = fitting.step
        if step in schedule.evaluations or schedule.is_checked(step):
            if found := diverged(fitting.losses[:step], schedule.total, classes):
                fitting.step, reason = found
                fitting.evaluations.append(_row(fitting, schedule, {}))
                folder.write_log(fitting.evaluations)
                return reason
            if step in schedule.evaluations:
                look()
        if time.monotonic() - saved >= checkpoint_seconds and step < schedule.total:
            fitting.save(folder.checkpoint, folder.name)
            saved = time.monotonic()
    return None


def _step(fitting: Fitting, task: TextTask, train: Examples, schedule: Schedule) -> None:
    """Take one step on its batch, counting its time and, on a GPU, its memory."""
    on, size, began = fitting.losses.device, fitting.asked.batch_size, time.perf_counter()
    order = order_of_epoch(fitting.asked.seed, schedule.epoch(fitting.step), len(train))
    start = fitting.step % schedule.per_epoch * size
    fitting.advance(task.batch(train, order[start : start + size].tolist()))
    if on.type == "cuda":
        if fitting.step in schedule.evaluations or schedule.is_checked(fitting.step):
            torch.cuda.synchronize(on)  # elsewhere the device is not waited for
        fitting.peak = max(fitting.peak, torch.cuda.max_memory_allocated(on))
    fitting.seconds += time.perf_counter() - began


def _row(fitting: Fitting, schedule: Schedule, found: dict[str, float]) -> dict[str, Any]:
    """A row of the log: where the run stands, the mean loss of the steps since the row before, and what validation says."""
    since = int(fitting.evaluations[-1]["step"]) if fitting.evaluations else 0
    losses = fitting.losses[since : fitting.step]
    row = {
        "step": fitting.step,
        "epoch": fitting.step / schedule.per_epoch,
        "seconds": fitting.seconds,
        "forward_passes": fitting.passes,
        "loss": float(losses.double().mean()) if len(losses) else None,
        **{f"validation_{name}": value for name, value in found.items()},
    }
    return {name: value if not isinstance(value, float) or math.isfinite(value) else None for name, value in row.items()}


def _line(row: dict[str, Any], total: int) -> str:
    """A row in words."""
    parts = [f"step {row['step']:,} of {total:,}", f"{row['seconds']:.1f} s"]
    parts += [f"loss {row['loss']:.4f}"] if row["loss"] is not None else []
    named = {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
    if named:
        told = ", ".join(f"{name.replace('_', ' ')} {'none' if value is None else f'{value:.4f}'}" for name, value in named.items())
        parts.append(f"validation: {told}")
    return " · ".join(parts)
