"""Whether the paper's explosion on CIFAR-10 is a random walk: the same run with longer steps, and with what should hold the walk back.

Noise adds up in squares: after t steps of rate γ a weight has walked γ²·Σ clip(d)² far, squared. A rate f times as large gets as far in a
f²-th of the steps, which a processor can do, while the gradient itself gets only an f-th as far: what comes f² times sooner is the walk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.paper import TABLE1
from forwardgrad.lab.studies import Arm, Optimizer, Run, Study

PAPER: Run = next(arm.run for arm in TABLE1 if arm.name == "cifar-cnn-sgd-forward")
EXPLODED, LEFT = 40_000, 29_000  # steps after which the paper's loss explodes, and leaves 2.3 before that
STEPS_PER_EPOCH = 625
EPOCHS = {1: 100, 5: 4, 10: 2}  # by the factor on the rate: the paper's whole walk, and twice that where it is cheap
GROWTH = 1.3  # a capped run's norm cannot grow further, were every step at the cap
WEIGHT_DECAY = 0.1  # times the factor; see `_held`
LABELS = {
    "paper": "the paper's",
    "weight-decay": "weight decay",
    "anneal": "annealed to zero",
    "cap": "capped steps",
    "low-rank": "rank-one directions",
}
USUAL = ("paper-x5", *(f"{remedy}-x10" for remedy in LABELS))


def noise(rows: list[str] | None = None, epochs: int | None = None, seeds: int = 1) -> Study:
    """The paper's row at 5 and 10 times its rate and the remedies at 10 times, or the arms named; `-x1` is the rate of the paper."""
    arms = tuple(_arm(remedy, factor, epochs or EPOCHS[factor]) for remedy, factor in _chosen(rows))
    return Study("noise", "The explosion on CIFAR-10: a random walk, and what holds it back", arms, seeds)


def _chosen(rows: list[str] | None) -> list[tuple[str, int]]:
    names = {f"{remedy}-x{factor}": (remedy, factor) for factor in EPOCHS for remedy in LABELS}
    wanted: set[str] = set()
    for row in rows or USUAL:
        found = [row] if row in names else [name for name in USUAL if name.startswith(f"{row}-")]
        if not found:
            raise UserError(f"no row {row!r} on noise: choose from {', '.join(names)}")
        wanted.update(found)
    return [pair for name, pair in names.items() if name in wanted]


def _arm(remedy: str, factor: int, epochs: int) -> Arm:
    lr = float(f"{PAPER.optimizer.lr * factor:.6g}")
    optimizer = replace(PAPER.optimizer, lr=lr)
    name = f"{remedy}-x{factor}"
    estimator: dict[str, Any] = PAPER.estimator
    if remedy == "low-rank":  # no remedy: as much noise from fewer random numbers
        estimator = {"name": "forward", "law": "rademacher", "clip": PAPER.estimator["clip"], "perturb": "low-rank"}
    return Arm(
        name=name,
        group="CNN · CIFAR-10 · SGD",
        kind="forward" if remedy == "paper" and factor == 10 else name,
        label=f"{LABELS[remedy]}, rate × {factor}",
        run=replace(PAPER, estimator=estimator, optimizer=_held(optimizer, remedy, factor, epochs), epochs=epochs),
        full_epochs=EPOCHS[factor],
    )


def _held(optimizer: Optimizer, remedy: str, factor: int, epochs: int) -> Optimizer:
    """The optimizer with a remedy of a strength that follows from the walk.

    Capped at c a norm grows at most by exp(T·c²/2) in T steps. Weight decay w balances noise where ‖θ‖² = γ·n·E[clip(d)²]/2w; at the
    start |d| ≈ 0.15, and w = 0.1·f puts the balance at 0.7 of the initial norm, below which |d| gets no larger.
    """
    if remedy == "weight-decay":
        return replace(optimizer, weight_decay=WEIGHT_DECAY * factor)
    if remedy == "anneal":
        return replace(optimizer, anneal=True)
    if remedy == "cap":
        return replace(optimizer, cap=float(f"{math.sqrt(2 * math.log(GROWTH) / (epochs * STEPS_PER_EPOCH)):.2g}"))
    return optimizer
