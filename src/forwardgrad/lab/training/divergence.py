"""Finds divergence: a loss that is not finite, or stays far above that of guessing."""

from __future__ import annotations

import math

from torch import Tensor

from forwardgrad.lab.training.training import Training

STUCK_STEPS = 500  # a run whose loss stays above the bound for so many steps in a row, or half of a short run, has diverged ...
STUCK_FACTOR = 20.0  # ... the bound being so many times the loss of guessing, ln(classes)
FIRST = 10  # steps whose losses stand for that of guessing where targets are no classes


def find_divergence(training: Training) -> str | None:
    """Why a run has diverged, None if it has not. A run that has is cut back to the step where that became certain."""
    run, state = training.run, training.state
    found = diverged(state.losses[: state.step], len(state.losses), 0 if run.loss else training.dataset.classes)
    if found is None:
        return None
    state.step, reason = found
    return reason


def diverged(losses: Tensor, total: int, classes: int) -> tuple[int, str] | None:
    """The step after which it is certain that a run has diverged, and why; None if it has not.

    `losses` are those of its steps so far, of `total`. Where targets are no classes, `classes` is 0.
    """
    losses = losses.cpu()
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        return int(bad[0]) + 1, "the loss is not finite"
    bound = _bound(losses, classes)
    window = min(STUCK_STEPS, max(1, total // 2))
    if len(losses) >= window and bool((losses[-window:] > bound).all()):
        return len(losses), f"the loss stayed above {bound:.1f} for {window} steps"
    return None


def _bound(losses: Tensor, classes: int) -> float:
    """The loss above which a run is stuck: `STUCK_FACTOR` times that of guessing among the classes.

    A user's loss has no classes, and may be negative. Its bound lies above the mean loss of the first steps, by `STUCK_FACTOR` − 1 times
    the mean size of those losses.
    """
    if classes > 1:
        return STUCK_FACTOR * math.log(classes)
    first = losses[:FIRST].double()
    size = float(first.abs().mean())
    return float(first.mean()) + (STUCK_FACTOR - 1) * size if size else math.inf
