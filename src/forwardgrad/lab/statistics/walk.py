"""How far a random walk takes the norm of parameters: knows nothing of files, and loads without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from forwardgrad.lab.statistics.summary import WINDOW, LossSummary, running_means
from forwardgrad.lab.studies import Optimizer


def rates(optimizer: Optimizer, steps: int, planned: int) -> list[float]:
    """The learning rate of each of the first `steps` of `planned` steps."""
    held = [math.exp(-optimizer.decay * step) * optimizer.lr for step in range(steps)]
    held = [rate * (step + 1) / optimizer.warm_up if step < optimizer.warm_up else rate for step, rate in enumerate(held)]
    return [rate * (1 + math.cos(math.pi * step / planned)) / 2 for step, rate in enumerate(held)] if optimizer.anneal else held


def growth(
    derivatives: Sequence[float], optimizer: Optimizer, *, clip: float | None, parameters: int, norm: float, planned: int
) -> list[float]:
    """‖θ_t‖/‖θ_0‖ after every step of SGD along d·v if every step Δθ, of length γ|clip(d)|√n, is at right angles to θ.

    Then ‖θ‖² grows by ‖Δθ‖², whatever the data; weight decay shrinks it and a cap shortens Δθ before. `norm` is ‖θ_0‖.
    """
    square, found = 1.0, []
    for rate, d in zip(rates(optimizer, len(derivatives), planned), derivatives, strict=True):
        square *= (1 - rate * optimizer.weight_decay) ** 2
        step = parameters * (rate * min(abs(d), math.inf if clip is None else clip) / norm) ** 2
        square += step if optimizer.cap is None else min(step, optimizer.cap**2 * square)
        found.append(math.sqrt(square))
    return found


def first_outside(losses: Sequence[float] | LossSummary, low: float, high: float, window: int = WINDOW) -> float:
    """The first step at which the mean loss of the last `window` steps lies outside the bounds, or is no number; infinity if none does.

    >>> first_outside([1.0] * 30 + [9.0] * 30, 0.5, 2.0, window=20)
    33.0
    """
    if isinstance(losses, LossSummary):
        if window != WINDOW:
            raise ValueError(f"a summary holds means of {WINDOW} losses, not of {window}")
        return losses.first_outside(low, high)
    for step, mean in running_means(losses, window):
        if not low <= mean <= high:
            return float(step)
    return next((float(step) for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), math.inf)
