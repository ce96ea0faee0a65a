"""Beale's and Rosenbrock's functions, which Baydin et al. minimise before any network: both arms from the same start.

Everything is kept in OUT/functions.json: paths, values, learning rates and a grid of function values for the contours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forwardgrad.estimators import Backprop, Estimator, ForwardGradient
from forwardgrad.gradient import estimate_grad_
from forwardgrad.lab import environment
from forwardgrad.lab.store import Store, read_json, write_json
from forwardgrad.lab.studies import SCHEMA, logspace, stream

SEEDS = 3  # of the forward arm; backpropagation has nothing random here
GRID = logspace(-4, -1, 7)  # learning rates either arm is tuned over
KEPT = 200  # first points of a path that are stored, and as many of the rest
FAR = 1e3  # a coordinate beyond this has left for good


def beale(t: Tensor) -> Tensor:
    """Beale's function of (x, y); its minimum 0 lies at (3, 0.5)."""
    x, y = t
    value: Tensor = (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
    return value


def rosenbrock(t: Tensor) -> Tensor:
    """Rosenbrock's function of (x, y); its minimum 0 lies at (1, 1)."""
    x, y = t
    value: Tensor = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return value


@dataclass(frozen=True)
class Task:
    """A function of the plane, where to start, and the one learning rate of the comparison that is not tuned."""

    name: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    bounds: tuple[tuple[float, float], tuple[float, float]]
    lr: float
    steps: int


TASKS = (
    Task("Beale", beale, (1.0, 1.5), (3.0, 0.5), ((-0.5, 4.0), (-1.0, 2.0)), lr=0.01, steps=1000),
    Task("Rosenbrock", rosenbrock, (-1.0, 0.0), (1.0, 1.0), ((-1.7, 1.7), (-0.8, 2.0)), lr=5e-4, steps=2000),
)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {task.name: task.function for task in TASKS}
ARMS: dict[str, Estimator] = {"forward": ForwardGradient(), "backprop": Backprop()}


@dataclass(frozen=True)
class Descent:
    """The points and values of one descent, before each step and after the last; shorter where it diverged."""

    path: list[tuple[float, float]]
    values: list[float]
    diverged: bool

    @property
    def final(self) -> float:
        return math.inf if self.diverged else self.values[-1]


def descend(task: Task, estimator: Estimator, lr: float, seed: int = 0) -> Descent:
    """Gradient descent with a constant learning rate, in float64."""
    point = torch.tensor(task.start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([point], lr)
    generator = torch.Generator().manual_seed(stream(seed, f"directions on {task.name}"))
    path, values = [task.start], []
    for _ in range(task.steps):
        optimizer.zero_grad()
        values.append(float(estimate_grad_(task.function, point, estimator, generator=generator).loss))
        optimizer.step()
        x, y = point.tolist()
        if not (math.isfinite(values[-1]) and abs(x) < FAR and abs(y) < FAR):
            return Descent(path, values[: len(path)], diverged=True)
        path.append((x, y))
    return Descent(path, [*values, float(task.function(point.detach()))], diverged=False)


def write(store: Store) -> dict[str, Any]:
    """Run both arms on both functions, at one learning rate and tuned over the same grid; a stored result is not repeated."""
    path = store.root / "functions.json"
    if (stored := read_json(path)) is not None and stored.get("schema") == SCHEMA:
        return stored
    result = {
        "schema": SCHEMA,
        "environment": environment.describe(torch.device("cpu")),
        "functions": [_compare(task) for task in TASKS],
    }
    write_json(path, result, depth=4)
    return result


def _compare(task: Task) -> dict[str, Any]:
    rates = sorted({task.lr, *GRID})
    runs = {
        (kind, lr): [descend(task, estimator, lr, seed) for seed in range(SEEDS if kind == "forward" else 1)]
        for kind, estimator in ARMS.items()
        for lr in rates
    }
    best = {kind: min(GRID, key=lambda lr, kind=kind: _median(runs[kind, lr])) for kind in ARMS}  # type: ignore[misc]
    arms = [_arm(kind, task.lr, runs[kind, task.lr], tuned=False) for kind in ARMS]
    arms += [_arm(kind, lr, runs[kind, lr], tuned=True) for kind, lr in best.items()]
    return {
        "name": task.name,
        "minimum": task.minimum,
        "bounds": task.bounds,
        "start": task.start,
        "steps": task.steps,
        "searched": list(GRID),
        "grid": _grid(task),
        "arms": arms,
    }


def _median(runs: list[Descent]) -> float:
    return statistics.median(run.final for run in runs)


def _arm(kind: str, lr: float, runs: list[Descent], *, tuned: bool) -> dict[str, Any]:
    shown, final = runs[0], _median(runs)
    last = len(shown.path) - 1
    kept = sorted({*range(min(KEPT, last)), *range(0, last + 1, -(-(last + 1) // KEPT)), last})  # the first steps are the long ones
    return {
        "kind": kind,
        "lr": lr,
        "tuned": tuned,
        "path": [shown.path[i] for i in kept],
        "steps": kept,
        "values": [shown.values[i] for i in kept],
        "diverged": shown.diverged,
        "final_median": final if math.isfinite(final) else None,
        "seeds": len(runs),
    }


def _grid(task: Task, points: int = 61) -> dict[str, Any]:
    (left, right), (low, high) = task.bounds
    x, y = torch.linspace(left, right, points, dtype=torch.float64), torch.linspace(low, high, points, dtype=torch.float64)
    z = task.function(torch.stack(torch.meshgrid(x, y, indexing="xy")))
    return {"x": x.tolist(), "y": y.tolist(), "z": [[float(f"{value:.5g}") for value in row] for row in z.tolist()]}
