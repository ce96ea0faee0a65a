"""What a run writes in its folder: where it runs, how far it has come, and in the end its tables and its result."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from forwardgrad.lab import store
from forwardgrad.lab.training import evaluation
from forwardgrad.lab.training.evaluation import finite
from forwardgrad.lab.training.norms import trained
from forwardgrad.lab.training.state import WEIGHTS
from forwardgrad.lab.training.training import Training

STATUS_SECONDS = 1.0  # between two writings of a status
SHOWN = 100  # steps whose mean loss a display shows
MOST_NATS = 700  # of a loss whose exponential is a number
WALKED = ("step", "norm_growth", "relative_step")
EVALUATED = (
    "step",
    "epoch",
    "seconds",
    "validation_loss",
    "validation_accuracy",
    "norm_growth",
    "relative_step",
    "validation_balanced_accuracy",
)


def write_environment(folder: Path, here: dict[str, Any]) -> None:
    """Write environment.json; a run that goes on elsewhere, or with another number of ranks, keeps where it was before."""
    before = store.read_json(folder / "environment.json")
    if before is not None:
        earlier = before.pop("before", None)
        if before != here:
            here = {**here, "before": before if earlier is None else {**before, "before": earlier}}
        elif earlier is not None:
            here = {**here, "before": earlier}
    store.write_json(folder / "environment.json", here)
    store.sync(folder.parent)  # from here on a power cut leaves the folder


def write_status(training: Training, folder: Path) -> None:
    """Write status.json for a display, at most once a second.

    After a power cut nobody asks for it, so it need not have reached the disk.
    """
    state = training.state
    if (now := time.monotonic()) - state.status_written < STATUS_SECONDS:
        return
    state.status_written = now
    loss = float(state.losses[max(0, state.step - SHOWN) : state.step].mean())
    validation = state.evaluations[-1][3] if state.evaluations else math.nan
    status = {
        "step": state.step,
        "steps": training.schedule.total,
        "loss": loss,
        "validation_loss": validation,
        "seconds": state.seconds,
    }
    store.write_json(folder / "status.json", {key: finite(value) for key, value in status.items()}, durable=False)


def finish(
    training: Training, folder: Path, reason: str | None, replicas: int | None = None, *, keep_weights: bool = False
) -> dict[str, Any]:
    """Evaluate, write the tables and last of all the result, then drop what only an unfinished run needs.

    `reason` is why the run diverged. `replicas` is how many runs shared the seconds, where they were trained as one program.
    The weights are kept of a final run that finished: trials are many, and a diverged network is of no use.
    """
    state = training.state
    validation_loss, validation_accuracy, validation_balanced = _validation(training, reason)
    test = _test(training) if training.run.test else None
    _write_tables(training, folder)
    result = {
        "status": "diverged" if reason else "finished",
        "reason": reason,
        "diverged_at": state.step if reason else None,
        "steps": state.step,
        "epochs": state.step / training.schedule.per_epoch,
        "parameters": sum(p.numel() for p in trained(state.model)),
        "seconds": state.seconds,
        "forward_passes": state.passes,
        "peak_bytes": state.peak or None,
        "initial_norm": finite(state.start),
        "validation_loss": finite(validation_loss),
        "validation_accuracy": finite(validation_accuracy),
        "validation_balanced_accuracy": finite(validation_balanced),
        **({"validation_perplexity": _perplexity(validation_loss)} if training.dataset.next_token else {}),
        "test": test,
        **({"replicas": replicas} if replicas else {}),
        **_joules(training),
        **_engine(training),
    }
    if keep_weights and training.run.test and not reason:
        store.write_checkpoint(folder / WEIGHTS, state.weights())
    store.write_result(folder, result)
    for name in ("checkpoint.pt", "status.json"):
        (folder / name).unlink(missing_ok=True)
    return result


def _perplexity(loss: float) -> float | None:
    """The exponential of the mean loss of a token: among as many equally likely tokens a guess would be as good."""
    return finite(math.exp(loss)) if loss < MOST_NATS else None


def _joules(training: Training) -> dict[str, Any]:
    """What the run used, where the machine told and no other program worked beside it."""
    used = training.state.joules
    return {"joules": {name: round(value, 3) for name, value in used.items()}} if used and not training.meter.shared else {}


def _engine(training: Training) -> dict[str, Any]:
    """Of a run in graphs: the seconds in which these were made, and why they were given up where they were."""
    step = training.state.training_step
    if training.run.engine == "eager" or step is None:
        return {}
    return {"compile_seconds": training.state.preparing, **({"fallback": step.fallback} if step.fallback else {})}


def _validation(training: Training, reason: str | None) -> tuple[float, float, float]:
    """Loss, accuracy and balanced accuracy on the validation split after the last step; those of an evaluation there are taken over."""
    state = training.state
    last = state.evaluations[-1] if state.evaluations and reason is None else None
    if last is not None and last[0] == state.step:
        return last[3], last[4], last[7]
    validation = training.dataset.validation
    measured = evaluation.losses_on(training, validation)
    return *evaluation.summary(measured), evaluation.balanced_accuracy(measured[1], validation.labels)


def _test(training: Training) -> dict[str, Any]:
    """The one look at the test split."""
    test = training.dataset.test
    measured = evaluation.losses_on(training, test)
    loss, accuracy = evaluation.summary(measured)
    return {
        "loss": finite(loss),
        "accuracy": finite(accuracy),
        "balanced_accuracy": finite(evaluation.balanced_accuracy(measured[1], test.labels)),
        "examples": len(measured[0]),
        **({"perplexity": _perplexity(loss)} if training.dataset.next_token else {}),
        **(
            evaluation.published_reading(measured[0], training.run.seed)
            if training.run.loss is None and not training.dataset.next_token
            else {}
        ),
    }


def _write_tables(training: Training, folder: Path) -> None:
    """Write evaluations, walk, and the loss and derivative of every step; what came after a divergence is left out."""
    state = training.state
    rows = ([*map(int, row[:1]), *(finite(v) for v in row[1:])] for row in state.evaluations if row[0] <= state.step)
    store.write_table(folder / "evaluations.csv", EVALUATED, rows)
    walk = ([int(step), *map(finite, rest)] for step, *rest in state.walk if step <= state.step)
    store.write_table(folder / "walk.csv", WALKED, walk)
    columns = {"loss": state.losses[: state.step].tolist(), "derivative": state.derivatives[: state.step].tolist()}
    if all(map(math.isnan, columns["derivative"])):
        del columns["derivative"]
    losses = ([i + 1, *(f"{value:.7g}" for value in values)] for i, values in enumerate(zip(*columns.values(), strict=True)))
    store.write_table(folder / "losses.csv.gz", ["step", *columns], losses)
