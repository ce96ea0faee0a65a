"""What is looked at while a run goes on, when it is beyond help, and what it leaves in its folder."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from forwardgrad.lab import data, store
from forwardgrad.lab.studies import Run
from forwardgrad.lab.training import parts
from forwardgrad.lab.training.evaluation import finite, losses_of, published_reading, summary
from forwardgrad.lab.training.state import State, steps_per_epoch

STUCK_STEPS = 500  # a run whose loss stays above the bound for so many steps in a row, or half of a short run, has diverged ...
STUCK_FACTOR = 20.0  # ... the bound being so many times the loss of guessing, ln(classes)
FIRST = 10  # steps whose losses stand for that of guessing where targets are no classes
SAID_SECONDS = 1.0  # between two writings of a status
SHOWN = 100  # steps whose mean loss a display shows
WALKED = ("step", "norm_growth", "relative_step")
EVALUATED = ("step", "epoch", "seconds", "validation_loss", "validation_accuracy", "norm_growth", "relative_step")


def say_where(folder: Path, here: dict[str, Any]) -> None:
    """Write environment.json; a run that goes on elsewhere keeps where it was before."""
    before = store.read_json(folder / "environment.json")
    if before is not None and {key: before.get(key) for key in here} != here:
        here = {**here, "before": before}
    store.write_json(folder / "environment.json", here)
    store.sync(folder.parent)  # from here on a power cut leaves the folder


def evaluate(run: Run, dataset: data.Dataset, state: State, per_epoch: int) -> None:
    """Add a row to the evaluations; the relative step is the root mean square of those measured since the last row.

    The walk has its row of this step by then.
    """
    loss, accuracy = summary(losses_of(state.model, dataset, dataset.validation, run.precision, loss=parts.loss(run)))
    stride = math.sqrt(sum(stride**2 for stride in state.strides) / len(state.strides))
    state.evaluations.append([state.step, state.step / per_epoch, state.seconds, loss, accuracy, state.walk[-1][1], stride])
    state.strides = []


def diverged(run: Run, state: State, classes: int) -> str | None:
    """Why the run is beyond help, None if it is not; cuts the run back to the step where that became certain."""
    losses = state.losses[: state.step].cpu()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        state.step = int(bad[0]) + 1
        return "the loss is not finite"
    bound, window = _bound(losses, 0 if run.loss else classes), min(STUCK_STEPS, max(1, len(state.losses) // 2))
    if state.step >= window and bool((losses[-window:] > bound).all()):
        return f"the loss stayed above {bound:.1f} for {window} steps"
    return None


def _bound(losses: Tensor, classes: int) -> float:
    """The loss above which a run is stuck: so many times that of guessing among classes.

    Where there are none, as far above the mean of the first steps as so many times their size would be: a user's loss may be negative.
    """
    if classes > 1:
        return STUCK_FACTOR * math.log(classes)
    first = losses[:FIRST].double()
    size = float(first.abs().mean())
    return float(first.mean()) + (STUCK_FACTOR - 1) * size if size else math.inf


def say(state: State, total: int, folder: Path) -> None:
    """Tell a display where the run is, at most once a second; after a power cut nobody asks, so it need not have reached the disk."""
    if (now := time.monotonic()) - state.said < SAID_SECONDS:
        return
    state.said = now
    loss = float(state.losses[max(0, state.step - SHOWN) : state.step].mean())
    validation = state.evaluations[-1][3] if state.evaluations else math.nan
    status = {"step": state.step, "steps": total, "loss": loss, "validation_loss": validation, "seconds": state.seconds}
    store.write_json(folder / "status.json", {key: finite(value) for key, value in status.items()}, durable=False)


def finish(run: Run, dataset: data.Dataset, state: State, folder: Path, reason: str | None, replicas: int | None = None) -> dict[str, Any]:
    """Evaluate, write the tables and last of all the result, then drop what only an unfinished run needs.

    `replicas` is how many runs shared the seconds, where they were trained as one program.
    """
    last = state.evaluations[-1] if state.evaluations and reason is None else None
    if last is not None and last[0] == state.step:
        validation = last[3], last[4]
    else:
        validation = summary(losses_of(state.model, dataset, dataset.validation, run.precision, loss=parts.loss(run)))
    test = None
    if run.test:
        measured = losses_of(state.model, dataset, dataset.test, run.precision, loss=parts.loss(run))
        loss, accuracy = summary(measured)
        test = {
            "loss": finite(loss),
            "accuracy": finite(accuracy),
            "examples": len(measured[0]),
            **(published_reading(measured[0], run.seed) if run.loss is None else {}),
        }
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
        "epochs": state.step / steps_per_epoch(run, dataset),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "seconds": state.seconds,
        "forward_passes": state.passes,
        "peak_bytes": state.peak or None,
        "initial_norm": finite(state.start),
        "validation_loss": finite(validation[0]),
        "validation_accuracy": finite(validation[1]),
        "test": test,
        **({"replicas": replicas} if replicas else {}),
    }
    store.write_result(folder, result)
    for name in ("checkpoint.pt", "status.json"):
        (folder / name).unlink(missing_ok=True)
    return result
