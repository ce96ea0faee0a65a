"""What a run tells of itself while it goes on: where it runs, and how far it has come."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from forwardgrad.lab import store
from forwardgrad.lab.training.evaluation import finite
from forwardgrad.lab.training.training import Training

STATUS_SECONDS = 1.0  # between two writings of a status
SHOWN = 100  # steps whose mean loss a display shows


def write_environment(folder: Path, here: dict[str, Any]) -> None:
    """Write environment.json; a run that goes on elsewhere keeps where it was before."""
    before = store.read_json(folder / "environment.json")
    if before is not None and {key: before.get(key) for key in here} != here:
        here = {**here, "before": before}
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
